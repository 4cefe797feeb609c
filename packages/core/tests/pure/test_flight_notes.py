"""Notes of sync rounds: what a rank holds and dumps of them, and where those of the ranks part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flights import document

from commplane.flight import FlightRecorder, Folder, Report, RoundNotes, report
from commplane.flight.read import Dump, parse

pytestmark = pytest.mark.timeout(30)


def recorder(folder: Path, length: int = 8) -> FlightRecorder:
    return FlightRecorder("job", 1, 2, length, Folder(str(folder)), {}, lambda: ())


def noted(*, steps: int = 0, each: int = 1) -> RoundNotes:
    notes = RoundNotes("cache", (0, 1), 1)
    for step in range(1, steps + 1):
        notes.step = step
        for n in range(each):
            notes.add("split", (step, n))
    return notes


def held(of: FlightRecorder) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(of.dump("now").read_text())["rounds"]
    return found


def test_a_dump_has_the_last_notes_with_their_numbers_and_steps(tmp_path: Path) -> None:
    plane = recorder(tmp_path, length=3)
    notes = noted()
    plane.round(2, notes)
    for step in (1, 1, 2, 4):
        notes.step = step
        notes.add("split", (step, 7))
    assert held(plane) == [
        {
            "name": "cache",
            "ranks": [0, 1],
            "instance": 2,
            "rank": 1,
            "steps": 4,
            "failed": False,
            "notes": [[2, 1, "split 1 7"], [3, 2, "split 2 7"], [4, 4, "split 4 7"]],
        }
    ]


def test_without_flight_records_no_note_is_held(tmp_path: Path) -> None:
    plane, notes = recorder(tmp_path, length=0), noted()
    plane.round(1, notes)
    notes.add("split", (1,))
    assert [(one["steps"], one["notes"]) for one in held(plane)] == [(0, [])]


def test_what_is_noted_after_the_round_failed_is_not_shown(tmp_path: Path) -> None:
    plane, notes = recorder(tmp_path), noted()
    plane.round(1, notes)
    notes.add("split", (1,))
    notes.fail()
    notes.add("cleanup", ())
    notes.fail()
    (one,) = held(plane)
    assert (one["failed"], one["notes"]) == (True, [[1, 0, "split 1"]])


def test_rounds_that_failed_and_closed_are_remembered_and_those_that_went_well_are_not(tmp_path: Path) -> None:
    plane = recorder(tmp_path)
    for instance in range(1, 25):
        notes = noted()
        plane.round(instance, notes)
        if instance % 2:
            notes.fail()
        notes.closed = instance != 24
    assert [one["instance"] for one in held(plane)] == [9, 11, 13, 15, 17, 19, 21, 23, 24]


def dumped(rank: int, *notes: tuple[int, int, str], steps: int, failed: bool = False, name: str = "cache") -> Dump:
    made = document(rank, [], world_size=3)
    one = {"name": name, "ranks": [0, 1, 2], "instance": 1, "rank": rank, "steps": steps, "failed": failed}
    made["rounds"] = [{**one, "notes": [list(n) for n in notes]}]
    return parse(f"flight-{rank}.json", json.dumps(made))


def three(*places: list[tuple[int, int, str]], steps: int = 5, failed: bool = False) -> Report:
    return report([dumped(rank, *notes, steps=steps, failed=failed) for rank, notes in enumerate(places)])


SAME = [(1, 2, "write 7 2"), (2, 5, "put 7 2")]


def test_equal_notes_are_nothing_wrong_and_the_last_are_shown() -> None:
    found = three(SAME, SAME, SAME)
    assert found.findings == []
    assert "sync round 'cache' over [0, 1, 2]; rounds completed by all ranks: 5\n" in str(found)
    assert "  rank 1: 5 rounds; last of 2 notes: write 7 2 (step 2); put 7 2 (step 5)\n" in str(found)
    (one,) = found.to_json()["rounds"]
    assert (one["name"], one["ranks"], one["instance"]) == ("cache", [0, 1, 2], 1)
    assert one["places"][2] == {
        "rank": 2,
        "steps": 5,
        "failed": False,
        "notes": 2,
        "last": [[1, 2, "write 7 2"], [2, 5, "put 7 2"]],
    }


def test_a_rank_that_decides_otherwise_is_named_with_the_first_step_and_both_notes() -> None:
    other = [(1, 2, "write 7 2"), (2, 4, "host evict 3 1"), (3, 5, "put 9 9")]
    most = [(1, 2, "write 7 2"), (2, 4, "write 8 1"), (3, 5, "put 7 2")]
    (finding,) = three(most, most, other).findings
    assert (finding.kind, finding.ranks, finding.seq) == ("decided", (2,), 4)
    assert finding.group == {"name": "cache", "ranks": [0, 1, 2], "instance": 1}
    assert finding.text == (
        "sync round 'cache' over [0, 1, 2]: rank 2 decided otherwise in step 4: 'host evict 3 1' "
        "where ranks 0, 1: 'write 8 1' (note 2)"
    )


def test_rank_0_is_named_where_the_others_are_at_one() -> None:
    (finding,) = three([(1, 1, "a")], [(1, 1, "b")], [(1, 1, "b")]).findings
    assert finding.ranks == (0,)
    assert finding.text.endswith("rank 0 decided otherwise in step 1: 'a' where ranks 1, 2: 'b' (note 1)")


def test_of_equally_many_the_lowest_rank_is_what_others_differ_from() -> None:
    (finding,) = three([(1, 1, "a")], [(1, 1, "b")], [(1, 1, "c")]).findings
    assert finding.ranks == (1, 2)
    assert finding.text.endswith(
        "rank 1 decided otherwise in step 1: 'b'; rank 2 decided otherwise in step 1: 'c' where rank 0: 'a' (note 1)"
    )


def test_the_same_note_in_another_step_is_a_difference() -> None:
    (finding,) = three([(1, 3, "a")], [(1, 4, "a")], [(1, 3, "a")]).findings
    assert (finding.ranks, finding.seq) == ((1,), 3)
    assert "rank 1 decided otherwise in step 3: 'a' in step 4 where ranks 0, 2: 'a' (note 1)" in finding.text


@pytest.mark.parametrize(("steps", "failed", "wrong"), [(5, False, False), (5, True, True), (6, False, True)])
def test_a_note_that_is_wanting_counts_once_its_rank_is_through_with_the_step(steps: int, failed: bool, wrong: bool) -> None:
    dumps = [dumped(0, *SAME, steps=5), dumped(1, *SAME, steps=5), dumped(2, SAME[0], steps=steps, failed=failed)]
    found = report(dumps).findings
    assert [f.ranks for f in found] == ([(2,)] if wrong else [])
    if wrong:
        assert "rank 2 decided otherwise in step 5: nothing where ranks 0, 1: 'put 7 2' (note 2)" in found[0].text


def test_a_rank_that_noted_nothing_at_all_is_compared_too() -> None:
    (finding,) = three(SAME, [], SAME).findings
    assert (finding.ranks, finding.seq) == ((1,), 2)


def test_where_notes_before_are_no_longer_held_the_step_may_be_an_earlier_one() -> None:
    late = [(9, 4, "a"), (10, 5, "b")]
    (finding,) = three([(8, 4, "x"), *late], late, [(9, 4, "a"), (10, 5, "c")]).findings
    assert "rank 2 decided otherwise in step 5: 'c' where ranks 0, 1: 'b' (note 10)" in finding.text
    (finding,) = three([(8, 4, "x"), *late], [(9, 4, "y"), (10, 5, "z")], late).findings
    assert "rank 1 decided otherwise in step 4 or before: 'y' where ranks 0, 2: 'a' (note 9)" in finding.text
    assert three([(8, 4, "x"), *late], late, [(11, 6, "d")], steps=6).findings == []


def test_a_rank_without_a_dump_is_shown_and_the_others_are_compared() -> None:
    found = report([dumped(0, *SAME, steps=5), dumped(2, SAME[0], (2, 5, "drop 7"), steps=5)])
    assert [(f.kind, f.ranks) for f in found.findings] == [("decided", (2,)), ("no_dump", (1,))]
    assert "rounds completed by ranks 0, 2: 5\n  rank 0: " in str(found)
    assert "  rank 1: no dump, or not open there\n" in str(found)
    assert found.to_json()["rounds"][0]["places"][1] == {"rank": 1, "steps": None, "failed": None, "notes": None, "last": []}


def test_rounds_of_other_names_are_compared_among_themselves() -> None:
    found = report([dumped(0, *SAME, steps=5), dumped(1, *SAME, steps=5), dumped(2, (1, 1, "q"), steps=5, name="rooms")])
    assert [one.name for one in found.rounds] == ["cache", "rooms"]
    assert found.findings == []


def test_dumps_of_before_there_were_notes_are_read() -> None:
    older = document(0, [], world_size=1)
    assert "rounds" not in older
    found = report([parse("flight-0.json", json.dumps(older))])
    assert list(found.rounds) == [] and found.findings == []


@pytest.mark.parametrize("broken", [[1, 2], [1, "x", "a"], 7])
def test_a_note_of_another_shape_is_said_to_be_wrong(broken: Any) -> None:
    made = document(0, [], world_size=1)
    made["rounds"] = [
        {"name": "cache", "ranks": [0], "instance": 1, "rank": 0, "steps": 1, "failed": False, "notes": [broken]},
    ]
    with pytest.raises(ValueError, match="a dump with something missing or of a wrong type"):
        parse("flight-0.json", json.dumps(made))
