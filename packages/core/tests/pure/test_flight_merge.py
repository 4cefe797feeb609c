"""The dumps of all ranks side by side: who is where, who is missing, whose calls differ, and the trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flights import SECOND, call, document, dump, group

from commplane.flight import Report, report
from commplane.flight.merge import Clock, lanes
from commplane.flight.read import parse


def merged(*dumps: Any) -> Report:
    return report(dumps)


def one(found: Report) -> Any:
    assert len(found.findings) == 1, found.findings
    return found.findings[0]


def test_ranks_that_all_finished_are_fine_wherever_they_were_met() -> None:
    found = merged(
        dump(0, [group([call(1), call(2), call(3)])]),
        dump(1, [group([call(1), call(2)])], at=99.0),
        dump(2, [group([call(1), call(2), call(3), call(4, start=99.9, took=None)])]),
    )
    assert found.findings == []
    (lane,) = found.to_json()["lanes"]
    assert (lane["finished_by_all"], lane["call"]) == (2, "#2 all_reduce(sum, float32, 64 bytes)")
    assert [(p["rank"], p["state"], p["finished"], p["seq"]) for p in lane["places"]] == [
        (0, "idle", 3, None),
        (1, "idle", 2, None),
        (2, "running", 3, 4),
    ]
    assert "nothing wrong found" in str(found)


def test_a_killed_rank_is_named_with_the_call_that_it_did_not_come_to() -> None:
    fault = {"type": "PeerError", "text": "lost ranks: 1", "missing_ranks": [1]}
    records = [call(1), call(2), call(3, "barrier", None, None, 0, took=0.5, state="failed", detail="PeerError: lost ranks: 1")]
    found = merged(
        dump(0, [group(records, fault=fault)], ended=[1]),
        dump(2, [group(records, fault=fault)], ended=[1]),
    )
    finding = one(found)
    assert (finding.kind, finding.ranks, finding.seq, finding.backend) == ("missing", (1,), 3, "torch")
    assert finding.group == {"purpose": "tp", "ranks": [0, 1, 2], "device": "cpu", "instance": 1}
    assert finding.text == (
        "'tp' over [0, 1, 2] on cpu, torch: rank 1 did not come to #3 barrier(); ranks 0, 2 failed in it after up to 0.5 s; "
        "rank 1 left no dump, its process had ended when ranks 0, 2 dumped"
    )
    assert found.to_json()["without_dump"] == [1]
    assert "  rank 1: no dump, its process had ended when ranks 0, 2 dumped\n" in str(found)


def test_a_rank_that_waits_in_another_communicator_is_found_there() -> None:
    dp: dict[str, Any] = {"ranks": (0, 1), "purpose": "dp"}
    tp: dict[str, Any] = {"ranks": (0, 1), "purpose": "tp"}
    found = merged(
        dump(0, [group([call(1), call(2, start=90, took=None)], **tp), group([], **dp)], world_size=2),
        dump(1, [group([call(1)], **tp), group([call(1, "all_gather", None, start=95, took=None)], **dp)], world_size=2),
    )
    assert [(f.kind, f.ranks, f.group["purpose"], f.seq) for f in found.findings] == [
        ("missing", (1,), "tp", 2),
        ("missing", (0,), "dp", 1),
    ]
    assert "rank 0 has been in it for 10 s; " in found.findings[0].text
    assert "rank 1 is in #1 all_gather(float32, 64 bytes) of 'dp' over [0, 1] on cpu, torch for 5 s" in found.findings[0].text


def test_a_rank_that_is_in_no_call_is_shown_with_its_last_one_and_what_it_said() -> None:
    found = merged(
        dump(0, [group([call(1), call(2, start=90, took=None)], (0, 1))], world_size=2),
        dump(1, [group([call(1, took=0.5)], (0, 1))], world_size=2, reason="the plane is left after ValueError: boom"),
    )
    assert one(found).text.endswith(
        "rank 1 ended its last call, #1 all_reduce(sum, float32, 64 bytes), 98.5 s before its dump, which says: "
        "the plane is left after ValueError: boom"
    )


def test_whom_the_backend_waits_for_is_believed_and_given_as_global_ranks() -> None:
    found = merged(
        dump(4, [group([call(1, took=None, waiting_for=[2])], (4, 5, 6))], world_size=7),
        dump(5, [group([call(1, took=None, waiting_for=[2])], (4, 5, 6))], world_size=7),
        dump(6, [group([], (4, 5, 6))], world_size=7),
    )
    missing = [f for f in found.findings if f.kind == "missing"]
    assert [(f.ranks, f.seq) for f in missing] == [((6,), 1)]
    assert found.to_json()["lanes"][0]["places"][0]["waiting_for"] == [6]
    assert {f.ranks for f in found.findings if f.kind == "no_dump"} == {(0,), (1,), (2,), (3,)}


def test_a_dump_from_before_the_call_proves_nothing_about_its_rank() -> None:
    found = merged(
        dump(0, [group([call(1), call(2, start=90, took=None)], (0, 1))], world_size=2),
        dump(1, [group([call(1)], (0, 1))], world_size=2, at=50.0),
    )
    assert (one(found).kind, one(found).ranks) == ("stuck", (0,))


def test_ranks_that_are_all_in_one_call_for_long_are_stuck_and_for_short_are_not() -> None:
    def both(start: float) -> Report:
        return merged(*(dump(r, [group([call(1, start=start, took=None)], (0, 1))], world_size=2) for r in (0, 1)))

    assert both(99.5).findings == []
    finding = one(both(40.0))
    assert (finding.kind, finding.ranks) == ("stuck", (0, 1))
    assert finding.text.endswith("ranks 0, 1 have been in #1 all_reduce(sum, float32, 64 bytes) for up to 60 s")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"collective": "broadcast", "op": None}, "rank 2 called #2 broadcast(float32, 64 bytes)"),
        ({"op": "max"}, "rank 2 called #2 all_reduce(max, float32, 64 bytes)"),
        ({"dtype": "bfloat16"}, "rank 2 called #2 all_reduce(sum, bfloat16, 64 bytes)"),
        ({"nbytes": 128}, "rank 2 called #2 all_reduce(sum, float32, 128 bytes)"),
    ],
)
def test_calls_that_differ_are_shown_with_their_ranks_at_the_first_number_only(changes: dict[str, Any], said: str) -> None:
    good, bad = call(2), {**call(2), **changes}
    found = merged(
        dump(0, [group([call(1), good, call(3)])]),
        dump(1, [group([call(1), good, call(3)])]),
        dump(2, [group([call(1), bad, call(3, nbytes=4)])]),
    )
    finding = one(found)
    assert (finding.kind, finding.seq, finding.ranks) == ("mismatch", 2, (0, 1, 2))
    assert f"ranks 0, 1 called #2 all_reduce(sum, float32, 64 bytes); {said}" in finding.text


def test_calls_that_differ_and_failed_for_it_are_one_finding() -> None:
    failed = [call(2, nbytes=n, took=0.1, state="failed", detail="MismatchError: other sizes") for n in (4, 8)]
    found = merged(*(dump(r, [group([call(1), failed[r]], (0, 1))], world_size=2) for r in (0, 1)))
    assert (one(found).kind, one(found).seq) == ("mismatch", 2)


@pytest.mark.parametrize("place", ["record", "fault"])
def test_a_mismatch_that_the_backend_found_makes_nobody_missing(place: str) -> None:
    told = "MismatchError: [tp rank 0/2] other sizes"
    failed = call(2, took=0.1, state="failed", detail=told if place == "record" else "status 7")
    fault = {"type": "MismatchError", "text": "[tp rank 0/2] other sizes", "missing_ranks": []} if place == "fault" else None
    found = merged(*(dump(r, [group([call(1), failed], (0, 1, 2), fault=fault)], world_size=3) for r in (0, 1)))
    assert [(f.kind, f.ranks) for f in found.findings] == [("failed", (0, 1)), ("no_dump", (2,))]
    assert found.findings[0].text.endswith(f" s: {told}")


def test_numbers_are_compared_within_one_backend_and_one_life_of_a_communicator() -> None:
    found = merged(
        dump(0, [group([call(1, nbytes=1)]), group([call(1, nbytes=2)], backend="x"), group([call(1, nbytes=3)], instance=2)]),
        dump(1, [group([call(1, nbytes=1)]), group([call(1, nbytes=2)], backend="x"), group([call(1, nbytes=3)], instance=2)]),
        dump(2, [group([call(1, nbytes=1)]), group([call(1, nbytes=2)], backend="x"), group([call(1, nbytes=3)], instance=2)]),
    )
    assert found.findings == []
    assert [lane.name for lane in found.lanes] == [
        "'tp' over [0, 1, 2] on cpu, torch",
        "'tp' over [0, 1, 2] on cpu, x",
        "'tp' over [0, 1, 2] on cpu (created 2 times), torch",
    ]


def test_a_rank_that_closed_the_communicator_is_missing_in_it() -> None:
    found = merged(
        dump(0, [group([call(1), call(2, start=90, took=None)], (0, 1))], world_size=2),
        dump(1, [], world_size=2),
    )
    assert (one(found).kind, one(found).ranks) == ("missing", (1,))
    assert "rank 1 does not have it open in its dump" in one(found).text
    assert "  rank 1: not open there\n" in str(found)


def test_a_fault_that_no_call_explains_is_a_finding_of_its_own() -> None:
    fault = {"type": "PeerError", "text": "prepare: waited 3 s for rank 1", "missing_ranks": [1]}
    found = merged(
        dump(0, [group([call(1)], (0, 1), fault=fault)], world_size=2), dump(1, [group([call(1)], (0, 1))], world_size=2)
    )
    assert (one(found).kind, one(found).ranks) == ("fault", (0,))
    assert one(found).text == "'tp' over [0, 1] on cpu failed: PeerError: prepare: waited 3 s for rank 1 (on rank 0)"


def test_records_that_could_not_be_read_are_a_finding() -> None:
    found = merged(
        dump(0, [group(None, (0, 1), problems={"torch": "ValueError: torn"})], world_size=2),
        dump(1, [group([call(1)], (0, 1))], world_size=2),
    )
    assert (one(found).kind, one(found).ranks) == ("unreadable", (0,))
    assert "the records of rank 0 could not be read there: ValueError: torn" in one(found).text


def test_ranks_of_one_machine_are_laid_side_by_side_by_their_monotonic_clock() -> None:
    # The wall clock was set back by an hour between the two dumps.
    dumps = [dump(0, [group([call(1)])], at=100, wall=5000), dump(1, [group([call(1)])], at=101, wall=1401)]
    clock = Clock(dumps)
    assert clock.at(dumps[1], 7 * SECOND) == clock.at(dumps[0], 7 * SECOND)
    assert clock.written(dumps[1]) - clock.written(dumps[0]) == SECOND


def test_ranks_of_two_machines_are_laid_side_by_side_by_their_wall_clocks() -> None:
    dumps = [
        dump(0, [group([call(1, start=10)])], at=100, wall=5000),
        dump(1, [group([call(1, start=910)])], at=1000, wall=5000, domain="other"),
    ]
    clock = Clock(dumps)
    assert clock.at(dumps[0], 10 * SECOND) == clock.at(dumps[1], 910 * SECOND) == 4910 * SECOND


def test_the_trace_has_a_process_a_rank_and_a_thread_a_lane_with_times_from_the_first_event() -> None:
    found = merged(
        dump(0, [group([call(1, start=50), call(2, "barrier", None, None, 0, start=60, took=None)], (0, 1))], world_size=2),
        dump(
            1,
            [group([call(1, start=50.25, took=0.0000015), call(2, start=70, took=1, state="failed", detail="why")], (0, 1))],
            world_size=2,
        ),
    )
    trace = found.trace()
    json.dumps(trace)
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"], e["name"]): e["args"] for e in events if e["ph"] == "M"}
    assert names[0, 0, "process_name"] == {"name": "rank 0 (box pid 1000)"}
    assert names[1, 1, "thread_name"] == {"name": "'tp' over [0, 1] on cpu, torch"}
    calls = [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"], e["args"]["seq"]) for e in events if e["ph"] == "X"]
    assert calls == [
        (0, 1, "all_reduce", 0.0, 1000.0, 1),
        (0, 1, "barrier (running)", 10e6, 40e6, 2),
        (1, 1, "all_reduce", 250000.0, 1.5, 1),
        (1, 1, "all_reduce (failed)", 20e6, 1e6, 2),
    ]
    failed = next(e for e in events if e["name"] == "all_reduce (failed)")
    assert failed["args"] == {
        "seq": 2, "op": "sum", "dtype": "float32", "bytes": 64, "state": "failed", "waiting_for": [], "detail": "why",
    }  # fmt: skip
    assert [(e["name"], e["ts"]) for e in events if e["ph"] == "i"] == [("dump: SIGUSR1", 50e6)] * 2
    assert trace["otherData"] == {"job": "job-a", "started_wall_ns": 3650 * SECOND}


def test_a_dump_without_any_call_makes_a_report_and_a_trace() -> None:
    found = merged(dump(0, [group([], (0,))], world_size=1))
    assert found.findings == [] and "last call finished by all ranks: none" in str(found)
    assert [e for e in found.trace()["traceEvents"] if e["ph"] == "X"] == []


def test_the_order_of_lanes_is_that_of_the_first_dump() -> None:
    dumps = [dump(0, [group([], purpose="b"), group([], purpose="a")]), dump(1, [group([], purpose="c")])]
    assert [lane.key.purpose for lane in lanes(dumps)] == ["b", "a", "c"]


GOOD = document(0, [group([call(1)])])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not whole, or no JSON"),
        (json.dumps(GOOD)[:-20], "not whole, or no JSON"),
        ("[1]", "not a dump of flight records"),
        ('{"traceEvents": []}', "not a dump of flight records"),
        (json.dumps({**GOOD, "schema": {"name": "commplane-flight", "version": 99}}), "wanted schema 1, found 99"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "rank"}), "KeyError: 'rank'"),
        (json.dumps({**GOOD, "communicators": None}), "of a wrong type"),
        (json.dumps({**GOOD, "communicators": [group([{**call(1), "seq": "one"}])]}), "seq wanted an integer"),
        (json.dumps({**GOOD, "communicators": [group([{**call(1), "finished_ns": None}])]}), "finished_ns wanted an integer"),
        (json.dumps({**GOOD, "communicators": [group([call(1, state="odd")])]}), "state wanted running, done or failed"),
        (json.dumps({**GOOD, "communicators": [group([{"seq": 1}])]}), "KeyError"),
    ],
)
def test_a_file_that_is_no_whole_dump_says_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse("f", text)
