"""The records of a job as a Chrome trace: one process a rank, one thread a backend of a communicator. Pure.

https://ui.perfetto.dev and chrome://tracing open it. Times are microseconds from the first event, because the numbers of a trace
are doubles and 1970 is too long ago for them to hold nanoseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from commplane.flight.merge import Clock, Lane
from commplane.flight.read import Dump

__all__ = ["chrome_trace"]

_COLOURS = {"running": "bad", "failed": "terrible"}


def chrome_trace(dumps: Sequence[Dump], lanes: Sequence[Lane], clock: Clock) -> dict[str, Any]:
    """The trace as JSON. A call that was running ends when its rank dumped, and its name says so."""
    starts = [clock.at(p.dump, r.started_ns) for lane in lanes for p in lane.known if p.dump for r in p.records]
    base = min([*starts, *(clock.written(d) for d in dumps)], default=0)

    def us(nanoseconds: int) -> float:
        return (nanoseconds - base) / 1000

    events: list[dict[str, Any]] = []
    for d in dumps:
        events.append(_name("process_name", d.rank, f"rank {d.rank} ({d.host} pid {d.pid})"))
        events.append({"ph": "M", "name": "process_sort_index", "pid": d.rank, "tid": 0, "args": {"sort_index": d.rank}})
        events.append(
            {"ph": "i", "s": "p", "name": f"dump: {d.reason}", "pid": d.rank, "tid": 0, "ts": us(clock.written(d)), "cat": "dump"}
        )
    for thread, lane in enumerate(lanes, start=1):
        for p in lane.known:
            if p.dump is None:
                continue
            events.append(_name("thread_name", p.rank, lane.name, thread))
            for r in p.records:
                begin = clock.at(p.dump, r.started_ns)
                end = clock.written(p.dump) if r.finished_ns is None else clock.at(p.dump, r.finished_ns)
                event = {
                    "ph": "X",
                    "name": r.collective if r.state == "done" else f"{r.collective} ({r.state})",
                    "cat": lane.backend,
                    "pid": p.rank,
                    "tid": thread,
                    "ts": us(begin),
                    "dur": max(end - begin, 0) / 1000,
                    "args": {
                        "seq": r.seq,
                        "op": r.op,
                        "dtype": r.dtype,
                        "bytes": r.nbytes,
                        "state": r.state,
                        "waiting_for": [lane.key.ranks[g] for g in r.waiting_for if g < len(lane.key.ranks)],
                        "detail": r.detail,
                    },
                }
                if r.state in _COLOURS:
                    event["cname"] = _COLOURS[r.state]
                events.append(event)
    job = dumps[0].job if dumps else ""
    return {
        "traceEvents": events,
        "displayTimeUnit": "ns",
        "otherData": {"job": job, "started_wall_ns": base},
    }


def _name(kind: str, process: int, text: str, thread: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": text}}
