"""Prefetches of several ranks: how they begin, end, fail and are aborted, and that no rank does so alone."""

from __future__ import annotations

import sys

import pytest
from cache_group import Group

from commplane.errors import MismatchError
from commplane_cache.prefetch import State

pytestmark = pytest.mark.timeout(30)
PROMPT = list(range(12))  # 6 pages

# One rank, TP or CP alone, and TP x CP: one group each, flattened.
SIZES = [1, 2, 4]


def loading(n, **options):
    """A group whose prefetch of 6 pages is being read, 2 pages at a time."""
    group = Group(n, prefetch_batch_pages=2, **options)
    assert group.prefetch("a", PROMPT)
    assert group.state("a") is State.QUERYING
    group.end("exists")
    group.step()
    assert group.state("a") is State.LOADING
    return group


@pytest.mark.parametrize("n", SIZES)
def test_what_all_ranks_have_is_read_and_goes_into_the_tree(n):
    group = loading(n, prefetch="wait_complete")
    for _ in range(3):
        assert not group.check("a")
        group.end("get")
        group.step()
    assert group.check("a")
    assert group.known(PROMPT) == (0, 6)
    assert group.owned("host", "tree") == [6] * n
    group.step()
    assert not group.caches[0].busy


def test_the_hit_is_that_of_the_rank_with_the_fewest_pages():
    group = Group(3, prefetch="wait_complete")
    group.prefetch("a", PROMPT)
    group.end("exists", [6, 3, 5])
    group.step()
    assert group.owned("host", "moving") == [3] * 3
    group.end("get")
    group.step()
    assert group.check("a")
    assert group.known(PROMPT) == (0, 3)


def test_no_rank_goes_on_before_the_last_one_has_answered():
    group = Group(2, prefetch="wait_complete")
    group.prefetch("a", PROMPT)
    group.end("exists", ranks=[0])
    group.step(3)
    assert group.state("a") is State.QUERYING
    group.end("exists", ranks=[1])
    group.step()
    assert group.state("a") is State.LOADING


def test_a_storage_that_fails_on_one_rank_counts_as_an_answer_of_no_pages():
    group = Group(2, prefetch="wait_complete")
    group.prefetch("a", PROMPT)
    group.end("exists", [6, 0], error="the server is gone")
    group.step()
    assert group.state("a") is State.REVOKED
    assert group.check("a")
    assert group.known(PROMPT) == (0, 0)
    assert group.caches[1].storage_error == "the server is gone"


def test_fewer_pages_than_are_worth_it_are_not_asked_for_or_not_read():
    group = Group(2, prefetch="wait_complete", prefetch_least_pages=4)
    assert not group.prefetch("short", PROMPT[:6])
    group.prefetch("a", PROMPT)
    group.end("exists", [6, 3])
    group.step()
    assert group.state("a") is State.REVOKED


@pytest.mark.parametrize("n", SIZES)
def test_a_read_that_fails_on_one_rank_stops_all_and_keeps_what_all_have(n):
    group = loading(n, prefetch="wait_complete")
    group.end("get")
    group.step()
    group.end("get", [1, *[2] * (n - 1)])  # rank 0 has three pages, the others have four and read on
    group.step(2)
    assert group.known(PROMPT) == (0, 3)
    assert group.check("a")
    if n > 1:
        assert group.owned("host", "moving") == [3] * n, "the other ranks' storage still writes to these"
        group.end("get", ranks=range(1, n))
        group.step()
    assert group.owned("host", "moving") == [0] * n
    assert group.caches[0].counters.storage.failed == 3


@pytest.mark.parametrize("n", SIZES)
def test_best_effort_takes_what_all_have_when_the_request_is_wanted(n):
    group = loading(n, prefetch="best_effort")
    group.end("get")
    group.step()
    group.end("get", ranks=range(1, n))  # the others are ahead of rank 0
    group.step()
    assert not group.check("a")
    group.step()
    assert group.all(lambda c: c.can_terminate_prefetch("a"))
    group.step()
    assert group.check("a")
    assert group.known(PROMPT) == (0, 2)


def test_best_effort_does_not_wait_for_an_answer():
    group = Group(2, prefetch="best_effort")
    group.prefetch("a", PROMPT)
    group.step()
    assert not group.check("a")
    group.step()
    assert group.check("a")
    assert group.caches[0].busy, "storage still owes an answer"
    group.end("exists")
    group.step()
    assert not group.caches[0].busy


def test_a_timeout_ends_a_prefetch_when_it_is_over_on_every_rank():
    group = loading(2, prefetch="timeout", timeout_base=5.0, timeout_per_1024_tokens=0.0)
    group.end("get")
    group.clocks = [100.0, 200.0]
    group.step()
    assert not group.check("a"), "time runs from when the request is wanted"
    group.clocks = [106.0, 204.0]
    group.step(2)
    assert not group.all(lambda c: c.can_terminate_prefetch("a"))
    assert group.state("a") is State.LOADING
    group.clocks[1] = 205.5
    group.step()
    assert group.all(lambda c: c.can_terminate_prefetch("a"))
    group.step()
    assert group.check("a")
    assert group.known(PROMPT) == (0, 2)


def test_a_timeout_ends_a_query_that_one_rank_does_not_answer():
    group = Group(2, prefetch="timeout", timeout_base=1.0)
    group.prefetch("a", PROMPT)
    group.end("exists", ranks=[0])
    group.check("a")
    group.clocks = [50.0, 50.0]
    group.step()
    assert group.check("a")
    group.end("exists", ranks=[1])
    group.step()
    assert not group.caches[0].busy


def test_the_timeout_grows_with_the_tokens():
    group = loading(1, prefetch="timeout", timeout_base=1.0, timeout_per_1024_tokens=1024.0, timeout_most=10.0)
    group.check("a")
    group.clocks[0] = 9.5  # 1 + 12 tokens, cut at 10
    group.step()
    assert group.state("a") is State.LOADING
    group.clocks[0] = 10.0
    group.step()
    assert group.state("a") is State.STOPPING


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("pipelined", [False, True])
def test_an_abort_on_one_rank_drops_the_prefetch_on_all_and_frees_pages_when_io_has_ended(n, pipelined):
    group = Group(n, prefetch="wait_complete", prefetch_batch_pages=2, pipelined=pipelined)
    steps = 2 if pipelined else 1
    group.prefetch("a", PROMPT)
    group.end("exists")
    group.step(steps)
    group.caches[-1].release_aborted_request("a")
    assert group.state("a") is State.LOADING, "no rank does it alone"
    group.step(steps)
    for cache in group.caches[:-1]:
        cache.release_aborted_request("a")
    assert group.state("a") is None
    assert group.owned("host", "moving") == [6] * n
    group.end("get", ranks=range(n - 1))
    group.step(2)
    assert group.owned("host", "moving") == [6] * n, "the storage of the last rank still writes to them"
    group.end("get", ranks=[n - 1])
    group.step(steps)
    assert group.owned("host", "moving") == [0] * n
    assert group.known(PROMPT) == (0, 0)
    assert not group.caches[0].busy


def test_an_abort_after_the_end_leaves_the_pages_in_the_tree():
    group = loading(2, prefetch="wait_complete", prefetch_least_pages=1)
    for _ in range(3):
        group.end("get")
        group.step()
    group.all(lambda c: c.release_aborted_request("a"))
    group.step(2)
    assert group.known(PROMPT) == (0, 6)
    assert group.check("a")


def test_an_aborted_request_that_waits_for_a_slot_is_dropped_when_all_ranks_have_heard_of_it():
    group = Group(2, prefetch="wait_complete", prefetch_slots=2)
    for i in range(3):
        group.prefetch(i, [i, *PROMPT])
    group.caches[1].release_aborted_request(2)
    group.step(2)
    assert group.state(2) is State.QUEUED
    group.caches[0].release_aborted_request(2)
    group.step()
    assert group.state(2) is None


def test_an_aborted_request_that_gets_a_slot_first_is_dropped_there():
    group = Group(2, prefetch="wait_complete", prefetch_slots=2)
    for i in range(3):
        group.prefetch(i, [i, *PROMPT])
    assert group.state(2) is State.QUEUED
    group.caches[0].release_aborted_request(2)
    group.end("exists", 0)
    group.step(2)
    group.end("exists", 0)
    group.step(2)
    group.end("exists")
    group.step(3)
    assert not group.caches[0].busy
    assert group.caches[0].counters.aborted == 1


def test_more_prefetches_than_slots_wait_in_the_order_of_their_calls():
    group = Group(2, prefetch="wait_complete", prefetch_slots=2)
    for i in range(5):
        assert group.prefetch(i, [i, *PROMPT])
    assert not group.prefetch(0, [0, *PROMPT]), "it has one"
    assert [group.state(i) for i in range(5)] == [State.QUERYING] * 2 + [State.QUEUED] * 3
    group.end("exists", 0)
    group.step(3)
    assert [group.state(i) for i in range(5)] == [State.REVOKED, *[State.QUERYING] * 2, *[State.QUEUED] * 2]


@pytest.mark.parametrize("pipelined", [False, True])
def test_a_timeout_ends_also_what_never_got_a_slot(pipelined):
    group = Group(2, prefetch="timeout", prefetch_slots=2, timeout_base=5.0, timeout_per_1024_tokens=0.0, pipelined=pipelined)
    for i in range(5):
        group.prefetch(i, [i, *PROMPT])
    group.check(4)
    group.clocks = [3.0, 3.0]
    group.check(2)
    group.clocks = [7.0, 4.0]
    group.step(2)
    assert [group.state(i) for i in (2, 3, 4)] == [State.QUEUED] * 3, "rank 1 would still wait"
    group.clocks = [7.0, 6.0]
    group.step(2)
    assert [group.state(i) for i in (2, 3, 4)] == [State.QUEUED, State.QUEUED, State.REVOKED]
    group.clocks = [9.0, 9.0]
    group.step(2)
    assert [group.check(i) for i in (2, 3, 4)] == [True, False, True]
    group.end("exists", 0)
    group.end("exists", 0)
    group.step(4)
    assert group.state(3) is State.QUERYING
    group.end("exists", 0)
    group.step(4)
    assert not group.caches[0].busy


def test_a_prefetch_takes_no_more_host_pages_than_there_are():
    group = Group(2, host=4, prefetch="wait_complete")
    group.prefetch("a", PROMPT)
    group.end("exists")
    group.step()
    assert group.owned("host", "moving") == [4, 4]


def test_the_prefix_that_a_prefetch_follows_stays_in_the_tree():
    group = Group(2, device=4, host=8, prefetch="wait_complete", write="write_back")
    assert group.serve(PROMPT[:4])
    group.prefetch("a", PROMPT)
    assert not group.all(lambda c: c.allocate(4) is not None), "it is written to the host first"
    group.end("exists")
    group.step()
    assert group.all(lambda c: c.allocate(4) is not None)
    group.end("get")
    group.step()
    assert group.known(PROMPT) == (0, 6)


@pytest.mark.parametrize("prefetch", ["best_effort", "wait_complete", "timeout"])
def test_a_rank_may_ask_and_abort_when_its_peers_do_not(prefetch):
    group = loading(3, prefetch=prefetch, timeout_base=0.0, timeout_per_1024_tokens=0.0)
    group.prefetch("queued", [7, *PROMPT])
    for rank in (0, 2):
        assert not group.caches[rank].check_prefetch_progress("a")
        group.step()
        assert group.state("a") is State.LOADING, "one rank does not wait for it yet"
    group.caches[0].release_aborted_request("a")
    assert not group.caches[1].check_prefetch_progress("a")
    group.step()
    assert [c.check_prefetch_progress("a") for c in group.caches[1:]] == [True, True], "dropped on all"
    group.caches[2].release_aborted_request("a")
    group.end("get")
    group.step(2)
    assert group.owned("host", "moving") == [0] * 3


def test_a_name_that_is_used_again_means_the_new_prefetch_while_the_old_one_still_writes():
    group = loading(2, prefetch="best_effort")
    group.check("a")
    group.step(2)
    assert group.state("a") is State.COMMITTED
    assert group.caches[1].check_prefetch_progress("a")  # told there, and not on rank 0
    assert group.prefetch("a", [7, *PROMPT])
    assert group.state("a") is State.QUERYING
    group.end("get")
    group.step()
    assert group.state("a") is State.QUERYING
    group.end("exists", 0)
    group.step()
    assert group.check("a")


def test_an_old_prefetch_that_was_aborted_does_not_take_the_name_from_a_new_one():
    group = loading(2, prefetch="best_effort")
    group.check("a")
    group.step(2)
    assert group.state("a") is State.COMMITTED
    group.all(lambda c: c.release_aborted_request("a"))
    assert group.prefetch("a", [7, *PROMPT])
    group.step()
    assert group.state("a") is State.QUERYING
    assert not group.check("a")


def test_more_that_wait_than_a_round_has_room_for_have_their_turns():
    group = Group(2, prefetch="timeout", prefetch_slots=2, timeout_base=1.0)
    for i in range(9):
        group.prefetch(i, [i, *PROMPT])
    for i in (3, 6, 8):
        group.check(i)
    group.clocks = [99.0, 99.0]
    group.step(4)
    assert [i for i in range(2, 9) if group.state(i) is State.REVOKED] == [3, 6, 8]


def test_the_four_operations_run_no_round():
    group = loading(4, prefetch="best_effort")
    before = [r.steps for r in group.rounds]
    group.all(lambda c: c.can_terminate_prefetch("a"))
    group.all(lambda c: c.check_prefetch_progress("a"))
    group.caches[0].release_aborted_request("a")
    group.all(lambda c: c.drain_storage_control_queues() is not None)
    assert [r.steps for r in group.rounds] == [r.asked for r in group.rounds] == before


def test_draining_again_does_nothing_and_says_the_same():
    group = Group(2)
    group.serve(PROMPT)
    group.step()
    drained = group.caches[0].drain_storage_control_queues()
    digest = group.caches[0].digest
    assert drained.writes == 1
    assert group.caches[0].drain_storage_control_queues() == drained
    assert group.caches[0].digest == digest


def test_a_rank_that_calls_something_else_is_found_in_the_next_step():
    group = Group(3)
    group.serve(PROMPT)
    group.step()
    group.caches[1].release(group.caches[1].allocate(1))
    with pytest.raises(MismatchError, match="rank 1") as caught:
        group.step()
    if sys.version_info >= (3, 11):
        assert "the cache's last decisions, after 2 rounds: 1 new node" in caught.value.__notes__[0]


def test_states_and_decisions_tell_the_life_of_a_prefetch():
    group = loading(1, prefetch="wait_complete")
    heard = []
    group.caches[0].on_decision(heard.append)
    for _ in range(3):
        group.end("get")
        group.step()
    said = [d.what for d in group.caches[0].decisions()]
    order = ["prefetch", "querying", "hit_agreed", "allocated", "loading", "new node", "host adopt", "committed"]
    assert [what for what in said if what in order] == order
    assert [d.what for d in heard] == said[-len(heard) :]
