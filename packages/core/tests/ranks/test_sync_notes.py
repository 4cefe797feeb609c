"""What is noted in rounds, in the dumps of threads as ranks, and what `commplane trace` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import MismatchError, PeerError
from commplane.flight import Report, read_job, report
from commplane.runtime import Plane, SyncRound
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(60)

SPEC = SyncSpec(name="c", api=(1, 0), fields=(SyncField("low", Vote.MIN),))


def traced(world_size: int, folder: Path, main: Callable[[Plane], Any], **config: Any) -> tuple[list[Any], Report]:
    results = run_threads(world_size, main, config=lambda _rank: {"timeout": 20, "flight_dir": str(folder), **config})
    dumps, skipped = read_job(folder)
    assert skipped == []
    return results, report(dumps)


def play(sync: SyncRound, steps: int, *, otherwise: int = 0, pipelined: bool = False) -> None:
    """Note what was agreed on in each step, and something else in one of them; the digest has the notes."""
    digest = 0
    if pipelined:
        sync.issue({"c.low": sync.rank}, digest=digest)
    for step in range(1, steps + 1):
        if pipelined:
            agreed = sync.result()
            sync.issue({"c.low": sync.rank + step}, digest=digest)
        else:
            agreed = sync.step({"c.low": sync.rank + step}, digest=digest)
        low = agreed["c.low"]
        assert isinstance(low, int)
        what = low + 100 * (step == otherwise)
        sync.note("took", step, what)
        digest += what
    if pipelined:
        sync.result()


@pytest.mark.parametrize("pipelined", [False, True], ids=["blocking", "pipelined"])
def test_the_step_in_which_ranks_part_is_found_in_what_they_dump_by_themselves(tmp_path: Path, pipelined: bool) -> None:
    def main(plane: Plane) -> None:
        play(plane.sync_round("x", specs=[SPEC]), 9, otherwise=4 if plane.rank == 2 else 0, pipelined=pipelined)

    results, found = traced(3, tmp_path, main)
    assert [type(r) for r in results] == [MismatchError] * 3
    (finding,) = [f for f in found.findings if f.kind == "decided"]
    assert (finding.ranks, finding.seq) == ((2,), 4)
    low = 3 if pipelined else 4
    assert f"rank 2 decided otherwise in step 4: 'took 4 {100 + low}' where ranks 0, 1: 'took 4 {low}'" in finding.text
    (one,) = found.rounds
    assert {(place.steps, place.failed) for place in one.known.values()} == {(5 if pipelined else 4, True)}


def test_ranks_that_agree_have_equal_notes_also_where_one_is_lost(tmp_path: Path) -> None:
    def main(plane: Plane) -> None:
        play(plane.sync_round("x", specs=[SPEC], timeout=1.0), 4 if plane.rank == 1 else 5)

    results, found = traced(3, tmp_path, main)
    assert [type(r) for r in results] == [PeerError, type(None), PeerError]
    assert [f for f in found.findings if f.kind == "decided"] == []
    (one,) = found.rounds
    assert set(one.known) == {0, 2}
    assert [note.text for note in one.known[0].notes] == [f"took {n} {n}" for n in range(1, 5)]
    assert one.known[0].notes == one.known[2].notes


def test_rounds_of_one_name_and_of_one_rank_have_notes_of_their_own(tmp_path: Path) -> None:
    def main(plane: Plane) -> None:
        with plane.sync_round("x", specs=[SPEC]) as first:
            play(first, 2)
        play(plane.sync_round("x", specs=[SPEC]), 3)
        play(plane.sync_round("x", [plane.rank], specs=[SPEC]), 1)
        plane.dump_flight_records("now")

    results, found = traced(2, tmp_path, main)
    assert results == [None, None]
    made = {(one.ranks, one.instance): [place.made for place in one.known.values()] for one in found.rounds}
    assert made == {((0, 1), 2): [3, 3], ((0,), 1): [1], ((1,), 1): [1]}  # what was closed without a fault is gone
    assert found.findings == []


def test_as_many_notes_are_held_as_calls(tmp_path: Path) -> None:
    def main(plane: Plane) -> None:
        play(plane.sync_round("x", specs=[SPEC]), 6)
        plane.dump_flight_records("now")

    _, found = traced(1, tmp_path, main, flight_records=4)
    (place,) = found.rounds[0].known.values()
    assert [note.number for note in place.notes] == [3, 4, 5, 6]
