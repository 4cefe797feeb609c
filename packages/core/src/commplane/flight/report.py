"""What `commplane trace` says of a job, as text and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from commplane.flight.findings import Detective, Finding, findings
from commplane.flight.merge import Clock, Lane, Place, describe, lanes, named, short
from commplane.flight.perfetto import chrome_trace
from commplane.flight.read import Dump, Skipped
from commplane.flight.rounds import RoundLane, round_lanes

__all__ = ["Report", "report"]


@dataclass(frozen=True)
class Report:
    """A job, its communicators and sync rounds, and what is wrong with it."""

    dumps: Sequence[Dump]
    skipped: Sequence[Skipped]
    lanes: Sequence[Lane]
    rounds: Sequence[RoundLane]
    findings: Sequence[Finding]
    clock: Clock
    detective: Detective

    @property
    def job(self) -> str:
        """Its name."""
        return self.dumps[0].job

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return max(d.world_size for d in self.dumps)

    def trace(self) -> dict[str, Any]:
        """For Perfetto."""
        return chrome_trace(self.dumps, self.lanes, self.clock)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "job": self.job,
            "world_size": self.world_size,
            "ranks": [_rank(d, self.clock) for d in self.dumps],
            "without_dump": [r for r in range(self.world_size) if all(r != d.rank for d in self.dumps)],
            "lanes": [_lane(lane) for lane in self.lanes],
            "rounds": [one.to_json() for one in self.rounds],
            "findings": [asdict(f) for f in self.findings],
            "skipped": [asdict(s) for s in self.skipped],
        }

    def __str__(self) -> str:
        have = [d.rank for d in self.dumps]
        lines = [f"job {self.job}, {self.world_size} ranks, dumps of {named(have)}"]
        by_rank = {d.rank: d for d in self.dumps}
        for r in range(self.world_size):
            dump = by_rank.get(r)
            lines.append(f"  rank {r}: {_dump(dump, self.clock) if dump else f'no dump, {self.detective.without_dump(r)}'}")
        for lane in self.lanes:
            lines.append(_headline(lane))
            lines += [f"  rank {p.rank}: {_place(lane, p)}" for p in lane.places.values()]
        lines += [line for one in self.rounds for line in one.lines()]
        lines.append("found" if self.findings else "nothing wrong found")
        lines += [f"  {f.text}" for f in self.findings]
        return "\n".join(lines)


def report(dumps: Sequence[Dump], skipped: Sequence[Skipped] = ()) -> Report:
    """Merge the dumps of one job, at least one."""
    merged, clock = lanes(dumps), Clock(dumps)
    rounds = round_lanes(dumps)
    detective = Detective(dumps, merged, clock)
    return Report(dumps, skipped, merged, rounds, findings(detective, rounds), clock, detective)


def _dump(dump: Dump, clock: Clock) -> str:
    time = datetime.fromtimestamp(clock.written(dump) / 1e9, timezone.utc)
    return f"{dump.host} pid {dump.pid}, {time:%H:%M:%S.%f} UTC, {short(dump.reason)}"


def _rank(dump: Dump, clock: Clock) -> dict[str, Any]:
    return {
        "rank": dump.rank,
        "file": dump.file,
        "host": dump.host,
        "pid": dump.pid,
        "versions": dict(dump.versions),
        "reason": dump.reason,
        "earlier": list(dump.earlier),
        "wall_ns": clock.written(dump),
        "ended": list(dump.ended),
    }


def _lane(lane: Lane) -> dict[str, Any]:
    call = lane.call(lane.finished)
    return {
        "purpose": lane.key.purpose,
        "ranks": list(lane.key.ranks),
        "device": lane.key.device,
        "instance": lane.instance,
        "backend": lane.backend,
        "finished_by_all": lane.finished,
        "call": None if call is None else describe(call),
        "places": [
            {
                "rank": p.rank,
                "state": p.pending.state if p.pending else "idle" if p.known else "unknown",
                "finished": p.finished if p.known else None,
                "seq": p.pending.seq if p.pending else None,
                "call": describe(p.pending) if p.pending else None,
                "seconds": p.seconds if p.pending else None,
                "waiting_for": list(lane.waiting_for(p)),
            }
            for p in lane.places.values()
        ],
    }


def _headline(lane: Lane) -> str:
    known = [p.rank for p in lane.known]
    whose = "all ranks" if len(known) == len(lane.places) else named(known)
    call = lane.call(lane.finished)
    last = "none" if not lane.finished else f"#{lane.finished}" if call is None else describe(call)
    return f"{lane.name}; last call finished by {whose}: {last}"


def _place(lane: Lane, place: Place) -> str:
    if place.dump is None:
        return "no dump"
    if not place.known:
        return "not open there"
    text = f"finished #{place.finished}" if place.finished else "finished no call"
    if place.pending is None:
        return text
    verb = "failed in" if place.pending.state == "failed" else "in"
    text += f", {verb} {describe(place.pending)} {'after' if place.pending.state == 'failed' else 'for'} {place.seconds:.3g} s"
    waiting = lane.waiting_for(place)
    return text + (f", waiting for {named(waiting)}" if waiting else "")
