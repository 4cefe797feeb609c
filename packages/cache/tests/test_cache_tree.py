"""The radix tree alone: what it finds, how it splits, and that a plain tree of pages finds the same."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane.errors import CommplaneError, ConfigError
from commplane_cache.bench.tree import PlainTree, measure, table
from commplane_cache.keys import page_keys
from commplane_cache.tree import Journal, RadixTree, TokenRun

pytestmark = pytest.mark.timeout(60)
PAGE = 3


def tree_of(names=True):
    return RadixTree(PAGE, Journal(100), names=names)


def add(tree, tokens, salt=b""):
    run = TokenRun(tokens, PAGE, salt=salt)
    path, known = tree.walk(run)
    if known < run.pages:
        path.append(tree.graft(path[-1] if path else tree.root, run, known, run.pages))
    return path


def test_runs_are_equal_whatever_holds_the_tokens():
    tokens = list(range(1, 12))
    want = TokenRun(tokens, PAGE)
    for other in (tuple(tokens), range(1, 12), np.array(tokens), np.array(tokens, np.uint8), torch.tensor(tokens)):
        run = TokenRun(other, PAGE)
        assert (run.data, run.pages, len(run)) == (want.data, 3, 11)
    assert want.keys(0, 3) == page_keys(tokens, PAGE)


@pytest.mark.parametrize("tokens", [[1, 2**31], [1.5], np.array([2**40]), np.zeros((2, 2))])
def test_tokens_that_do_not_fit_are_refused(tokens):
    with pytest.raises(ConfigError, match=r"below 2\*\*31"):
        TokenRun(tokens, PAGE)


def test_an_extended_run_keeps_its_keys():
    short = TokenRun(range(7), PAGE)
    head = short.keys(0, 2)
    longer = short.extended(range(7, 13))
    assert longer.pages == 4
    assert longer.keys(0, 4) == page_keys(range(13), PAGE)
    assert longer.keys(0, 2) == head
    assert short.pages == 2


def test_another_salt_is_another_tree_and_other_keys():
    tree = tree_of()
    add(tree, range(9))
    salted = TokenRun(range(9), PAGE, salt=b"adapter 7")
    assert tree.peek(salted) == 0
    add(tree, range(9), salt=b"adapter 7")
    assert tree.peek(salted) == 3
    assert not set(salted.keys(0, 3)) & set(TokenRun(range(9), PAGE).keys(0, 3))


def test_a_short_page_after_a_salt_is_not_taken_for_a_page_after_another_salt():
    tree = tree_of()
    add(tree, np.frombuffer(b"saltpageabcd", "<i4"))  # its bytes are a salt of 4 and two tokens
    assert tree.peek(TokenRun(np.frombuffer(b"pageabcd", "<i4"), PAGE, salt=b"salt")) == 0
    assert tree.walk(TokenRun(np.frombuffer(b"pageabcd", "<i4"), PAGE, salt=b"salt")) == ([], 0)


def test_a_node_is_split_where_runs_part():
    tree = tree_of()
    (long,) = add(tree, range(18))
    first, other = add(tree, [*range(6), *[50] * 6])
    assert (first.count, long.count, other.count) == (2, 4, 2)
    assert long.parent is first
    assert first.names + long.names == page_keys(range(18), PAGE)
    assert sorted(n.seq for n in tree.nodes()) == [1, 2, 3]


def test_a_walk_can_stop_in_the_middle_of_a_node():
    tree = tree_of()
    add(tree, range(18))
    path, known = tree.walk(TokenRun(range(18), PAGE), 4)
    assert known == 4
    assert [n.count for n in path] == [4]
    assert tree.walk(TokenRun(range(18), PAGE), 0) == ([], 0)


def test_peek_changes_nothing():
    tree = tree_of()
    add(tree, range(18))
    assert tree.peek(TokenRun([*range(8), 99], PAGE)) == 2
    assert tree.size == 1


def test_what_is_locked_or_has_children_is_not_removed():
    tree = tree_of()
    (node,) = add(tree, range(6))
    tree.lock(node)
    with pytest.raises(CommplaneError, match="still needed"):
        tree.remove(node)
    assert tree.unlock(node) == [node, tree.root]
    with pytest.raises(CommplaneError, match="nobody had locked"):
        tree.unlock(node)
    add(tree, range(12))
    with pytest.raises(CommplaneError, match="still needed"):
        tree.remove(node)


def test_locks_hold_both_parts_of_a_split_node():
    tree = tree_of()
    (node,) = add(tree, range(18))
    tree.lock(node)
    tree.walk(TokenRun(range(9), PAGE))
    assert node.locks == node.parent.locks == tree.root.locks == 1
    assert tree.unlock(node) == [node, node.parent, tree.root]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=24), max_size=12), st.lists(st.integers(0, 2), max_size=24))
def test_it_knows_the_prefixes_that_a_set_of_pages_knows(prompts, wanted):
    tree, pages = tree_of(names=False), set()
    for tokens in prompts:
        add(tree, tokens)
        pages.update(tuple(tokens[: i * PAGE]) for i in range(1, len(tokens) // PAGE + 1))
    known = 0
    while (known + 1) * PAGE <= len(wanted) and tuple(wanted[: (known + 1) * PAGE]) in pages:
        known += 1
    run = TokenRun(wanted, PAGE)
    assert tree.peek(run) == known
    assert tree.walk(run)[1] == known
    assert tree.peek(run) == known
    for node in tree.nodes():
        assert len(node.key) == node.count * PAGE * 4
        assert node.parent.children[node.edge] is node


def test_equal_calls_give_equal_digests_and_every_other_call_another():
    def play(calls):
        tree = tree_of()
        journal = tree._journal
        for tokens in calls:
            add(tree, tokens)
        return journal.digest

    draw = random.Random(7)
    calls = [[draw.randrange(3) for _ in range(12)] for _ in range(8)]
    assert play(calls) == play([list(c) for c in calls])
    seen = {play(calls)}
    for i in range(len(calls)):
        changed = [list(c) for c in calls]
        changed[i][5] += 5
        seen.add(play(changed))
    assert len(seen) == 9


def test_a_difference_in_the_digest_stays_after_equal_notes():
    one, other = Journal(4), Journal(4)
    one.note("split", 1, 2, 3)
    other.note("split", 1, 2, 4)
    for i in range(1000):
        one.note("split", i)
        other.note("split", i)
        one.mix(i, i)
        other.mix(i, i)
        assert one.digest != other.digest
        assert 0 <= one.digest < 2**63


def test_the_journal_keeps_the_last_decisions_and_tells_a_listener():
    journal, heard = Journal(2), []
    journal.note("new node", 1)
    journal.listener = heard.append
    journal.step = 5
    journal.note("split", 2, 3, 4)
    journal.note("removed", 6)
    assert [(d.step, d.what, d.numbers) for d in journal.decisions()] == [(5, "split", (2, 3, 4)), (5, "removed", (6, 0, 0))]
    assert journal.decisions() == heard


def test_the_digest_is_the_same_in_every_process():
    """Ranks are other processes, maybe of another Python: nothing may depend on hash seeds or addresses."""
    journal = Journal(4)
    journal.note("new node", 1, 0, zlib.crc32(b"tokens"))
    journal.mix(4, 1, 2)
    assert journal.digest == 2921076256528286642


def test_the_bench_measures_trees_that_find_the_same():
    plain, tree = PlainTree(PAGE), tree_of()
    draw = random.Random(3)
    for _ in range(30):
        tokens = [draw.randrange(2) for _ in range(draw.randrange(24))]
        assert len(plain.match(tokens)) == tree.peek(TokenRun(tokens, PAGE))
        plain.insert(tokens, range(8))
        add(tree, tokens)
    out = measure(tokens=[64, 128], page_tokens=PAGE, passes=2)
    assert set(out["lengths"]) == {"64", "128"}
    assert all(us > 0 for figures in out["lengths"].values() for us in figures.values())
    assert "plain insert" in table(out)
