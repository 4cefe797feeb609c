"""Sync rounds of many ranks in one thread: the packing and the rules of real ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import ConfigError, MismatchError, PeerError, UnsupportedOperation
from commplane.testing import SimulatedRounds

pytestmark = pytest.mark.timeout(30)

NAIVE = {
    Vote.ANY: lambda column: int(any(column)),
    Vote.ALL: lambda column: int(all(column)),
    Vote.MIN: min,
    Vote.MAX: max,
    Vote.SUM: sum,
    Vote.LEADER: lambda column: column[0],
}


def spec(name: str, *fields: tuple[str, Vote] | tuple[str, Vote, int]) -> SyncSpec:
    return SyncSpec(name=name, api=(1, 0), fields=tuple(SyncField(*f) for f in fields))


def everything(rounds: SimulatedRounds, values: list[dict[str, Any]]) -> list[Any]:
    for one, mine in zip(rounds, values, strict=True):
        one.issue(mine)
    return [one.result() for one in rounds]


shapes = st.lists(st.tuples(st.sampled_from(list(Vote)), st.integers(1, 4)), min_size=1, max_size=12)


@given(shapes, st.integers(1, 6), st.integers(0, 2**32))
def test_every_rule_is_that_of_a_naive_column_by_column_reduction(
    shape: list[tuple[Vote, int]], world_size: int, seed: int
) -> None:
    drawn = random.Random(seed)
    rounds = SimulatedRounds(world_size, [spec("a", *((f"f{i}", rule, count) for i, (rule, count) in enumerate(shape)))])
    for _ in range(3):
        values: list[dict[str, Any]] = [
            {
                f"a.f{i}": [drawn.randint(-3, 3) for _ in range(count)] if count > 1 else drawn.randint(-3, 3)
                for i, (_, count) in enumerate(shape)
            }
            for _ in range(world_size)
        ]
        wanted: dict[str, Any] = {}
        for i, (rule, count) in enumerate(shape):
            columns = zip(*(v[f"a.f{i}"] if count > 1 else [v[f"a.f{i}"]] for v in values), strict=True)
            agreed = tuple(NAIVE[rule](column) for column in columns)
            wanted[f"a.f{i}"] = agreed if count > 1 else agreed[0]
        assert everything(rounds, values) == [wanted] * world_size


def test_ranks_may_read_one_round_and_issue_the_next_before_others_have_read() -> None:
    rounds = SimulatedRounds(3, [spec("a", ("x", Vote.SUM))])
    for one in rounds:
        one.issue({"a.x": 1})
    for step in range(1, 50):
        order = random.Random(step).sample(list(rounds), 3)
        for one in order:
            assert one.result() == {"a.x": 3 * step}
            one.issue({"a.x": step + 1})
        assert {one.steps for one in rounds} == {step}


def test_a_round_that_some_ranks_did_not_issue_names_them_on_all() -> None:
    rounds = SimulatedRounds(3, [spec("a", ("x", Vote.MIN))], ranks=[4, 5, 6])
    everything(rounds, [{"a.x": 1}] * 3)
    rounds[0].issue({"a.x": 1})
    rounds[2].issue({"a.x": 1})
    for one in (rounds[0], rounds[2]):
        with pytest.raises(PeerError, match="step 2 is read and rank 5 did not issue it") as raised:
            one.result()
        assert raised.value.missing_ranks == (5,)
    with pytest.raises(PeerError, match="rank 5"):
        rounds[1].issue({"a.x": 1})


def test_a_digest_that_differs_names_whose_state_it_is() -> None:
    rounds = SimulatedRounds(4, [spec("a", ("x", Vote.MIN))])
    for one in rounds:
        one.issue({"a.x": 0}, digest=7 + (one.rank == 2))
    for one in rounds:
        with pytest.raises(MismatchError, match=r"before step 1: digest 0x7 on ranks 0, 1, 3, rank 2 has 0x8"):
            one.result()


@pytest.mark.parametrize(
    ("values", "digest", "words"),
    [
        ({"a.x": 1}, 0, "missing: a.v, unknown: none"),
        ({"a.x": 1, "a.v": [1, 2], "a.y": 0}, 0, "missing: none, unknown: a.y"),
        ({"a.x": 1, "a.v": [1, 2, 3]}, 0, r"2 integers of 64 bits for a.v, found \[1, 2, 3\]"),
        ({"a.x": 1, "a.v": 4}, 0, "2 integers of 64 bits for a.v, found 4"),
        ({"a.x": 1.5, "a.v": [1, 2]}, 0, "an integer of 64 bits for a.x, found 1.5"),
        ({"a.x": 2**63, "a.v": [1, 2]}, 0, "for a.x, found 9223372036854775808"),
        ({"a.x": 1, "a.v": [1, 2**62]}, 0, "whose sum over the ranks fits into 64 bits, found one of 4611686018427387904"),
        ({"a.x": 1, "a.v": [1, 2]}, 2**63, "a digest of at most 63 bits, found 9223372036854775808"),
    ],
)
def test_values_that_do_not_fit_are_refused_and_nothing_is_issued(values: dict[str, Any], digest: int, words: str) -> None:
    rounds = SimulatedRounds(3, [spec("a", ("x", Vote.LEADER), ("v", Vote.SUM, 2))])
    with pytest.raises(UnsupportedOperation, match=words):
        rounds[0].issue(values, digest=digest)
    assert everything(rounds, [{"a.x": 5, "a.v": (1, 2)}] * 3) == [{"a.x": 5, "a.v": (3, 6)}] * 3


def test_one_round_is_out_at_a_time() -> None:
    one = SimulatedRounds(1, [spec("a", ("x", Vote.MIN))])[0]
    with pytest.raises(UnsupportedOperation, match="no round is out"):
        one.result()
    one.issue({"a.x": 1})
    with pytest.raises(UnsupportedOperation, match="step 1 is out already"):
        one.issue({"a.x": 2})
    assert one.result() == {"a.x": 1} and one.step({"a.x": 3}) == {"a.x": 3} and one.steps == 2


def test_two_specs_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="each spec once, found a, a"):
        SimulatedRounds(1, [spec("a", ("x", Vote.MIN)), spec("a", ("y", Vote.MIN))])
