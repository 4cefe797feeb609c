"""What is wrong in the records of a job: who is missing where, who stopped, whose calls differ. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from commplane.flight.merge import Clock, Lane, Place, describe, named, short
from commplane.flight.read import Dump
from commplane.flight.rounds import RoundLane

__all__ = ["STUCK_S", "Detective", "Finding", "findings"]

STUCK_S = 1.0
"""A call that had run for longer when it was dumped counts as stuck; one that was merely met on its way does not."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: ``no_dump``, ``missing``, ``stuck``, ``failed``, ``mismatch``, ``decided``, ``fault`` or ``unreadable``.
        text: one sentence.
        ranks: the global ranks that it is about: those missing, where some are.
        group: the communicator, or the sync round, or empty.
        backend: or empty.
        seq: number of the call, or of the step, or None.
    """

    kind: str
    text: str
    ranks: tuple[int, ...]
    group: dict[str, Any] = field(default_factory=dict)
    backend: str = ""
    seq: int | None = None


def findings(detective: Detective, rounds: Sequence[RoundLane] = ()) -> list[Finding]:
    """Everything that is wrong, the calls first, then the notes of sync rounds."""
    dumps, lanes = list(detective.dumps.values()), detective.lanes
    out = [f for lane in lanes for f in detective.lane(lane)]
    explained = {str(f.group) for f in out if f.kind in ("missing", "failed", "mismatch")}
    out += [f for one in rounds if (f := _decided(one)) is not None]
    out += [f for f in detective.faults() if str(f.group) not in explained]
    missing = {r for f in out if f.kind == "missing" for r in f.ranks}
    world = max((d.world_size for d in dumps), default=0)
    out += [
        Finding("no_dump", f"rank {r} left no dump: {detective.without_dump(r)}", (r,))
        for r in range(world)
        if r not in detective.dumps and r not in missing
    ]
    return out


def _decided(one: RoundLane) -> Finding | None:
    """Ranks whose notes part from those of most; a round in which they do need not have failed yet."""
    parting = one.parting()
    if parting is None:
        return None
    ranks = tuple(sorted(r for others in list(parting.said.values())[1:] for r in others))
    return Finding("decided", f"{one.title}: {parting}", ranks, one.group, seq=parting.step)


def _group(lane: Lane) -> dict[str, Any]:
    return {
        "purpose": lane.key.purpose,
        "ranks": list(lane.key.ranks),
        "device": lane.key.device,
        "instance": lane.instance,
    }


class Detective:
    """Looks at one lane after the other, knowing all of them."""

    def __init__(self, dumps: Sequence[Dump], lanes: Sequence[Lane], clock: Clock) -> None:
        self.dumps = {d.rank: d for d in dumps}
        self.lanes = lanes
        self._clock = clock

    def without_dump(self, rank: int) -> str:
        """Why a rank may have left no dump."""
        witnesses = [d.rank for d in self.dumps.values() if rank in d.ended]
        if witnesses:
            return f"its process had ended when {named(witnesses)} dumped"
        return "it was killed, it was not asked, nothing failed there, or its file is in another folder"

    def lane(self, lane: Lane) -> list[Finding]:
        """What is wrong among the calls of one lane."""
        out = []
        different = lane.difference()
        if different is not None:
            seq, calls = different
            said = "; ".join(f"{named(ranks)} called {call}" for call, ranks in calls.items())
            ranks = tuple(sorted(r for members in calls.values() for r in members))
            out.append(
                Finding("mismatch", f"{lane.name}: ranks made different calls: {said}", ranks, _group(lane), lane.backend, seq)
            )
        stops = sorted({p.pending.seq for p in lane.known if p.pending is not None} - {f.seq for f in out})
        out += [f for seq in stops if (f := self._stop(lane, seq)) is not None]
        for p in lane.places.values():
            if p.dump is not None and not p.known:
                problem = next(
                    (
                        g.problems[lane.backend]
                        for g in p.dump.groups
                        if (g.key, g.instance) == (lane.key, lane.instance) and lane.backend in g.problems
                    ),
                    None,
                )
                if problem is not None:
                    text = f"{lane.name}: the records of rank {p.rank} could not be read there: {problem}"
                    out.append(Finding("unreadable", text, (p.rank,), _group(lane), lane.backend))
        return out

    def _stop(self, lane: Lane, seq: int) -> Finding | None:
        """What is wrong at a call that some ranks have not finished."""
        inside = [p for p in lane.known if p.pending is not None and p.pending.seq == seq]
        failed = [p for p in inside if p.pending is not None and p.pending.state == "failed"]
        longest = max(p.seconds for p in inside)
        if not failed and longest < STUCK_S:
            return None
        call = next(describe(p.pending) for p in inside if p.pending is not None)
        who = named([p.rank for p in inside])
        details = list(dict.fromkeys(p.pending.detail for p in failed if p.pending is not None and p.pending.detail))
        verb = "failed in" if failed else "have been in" if len(inside) > 1 else "has been in"
        span = f"{'after' if failed else 'for'} {'up to ' if len(inside) > 1 else ''}{longest:.3g} s"
        # What the communicator raised says more than what its backend wrote down, where it came to that.
        faults = [p.group.fault for p in failed if p.group is not None and p.group.fault]
        details = list(dict.fromkeys(faults)) or details
        missing = [] if any(d.startswith("MismatchError") for d in details) else self._missing(lane, seq, inside)
        if missing:
            why = "; ".join(f"rank {r} {self._where(lane, lane.places[r], seq)}" for r in missing)
            text = f"{lane.name}: {named(missing)} did not come to {call}; {who} {verb} it {span}; {why}"
            return Finding("missing", text, tuple(missing), _group(lane), lane.backend, seq)
        kind = "failed" if failed else "stuck"
        text = f"{lane.name}: {who} {verb} {call} {span}" + (f": {short(details[0])}" if details else "")
        return Finding(kind, text, tuple(p.rank for p in inside), _group(lane), lane.backend, seq)

    def _missing(self, lane: Lane, seq: int, inside: Sequence[Place]) -> list[int]:
        """Who is waited for: whom the backends named, else who has not begun the call."""
        told = {r for p in inside for r in lane.waiting_for(p)}
        if told:
            return sorted(told)
        begun = min(self._clock.at(p.dump, p.pending.started_ns) for p in inside if p.dump and p.pending)
        absent = []
        for p in lane.places.values():
            # A dump from before the call says nothing about it: the rank may have come later.
            late = p.dump is not None and self._clock.written(p.dump) < begun
            if (not p.known or p.began < seq) and not late:
                absent.append(p.rank)
        return sorted(absent)

    def _where(self, lane: Lane, place: Place, seq: int) -> str:
        """What a rank that is waited for does instead."""
        if place.dump is None:
            return f"left no dump, {self.without_dump(place.rank)}"
        for other in self.lanes:
            p = other.places.get(place.rank)
            if other is not lane and p is not None and p.pending is not None:
                running = p.pending.state == "running"
                did = f"{'is' if running else 'failed'} in {describe(p.pending)} of {other.name}"
                return f"{did} {'for' if running else 'after'} {p.seconds:.3g} s"
        said = f", which says: {short(place.dump.reason)}"
        if not place.known:
            return f"does not have it open in its dump{said}"
        if place.began == seq and place.pending is not None:
            return f"is in it too in its dump{said}"
        if place.began >= seq:
            return f"has finished it in its dump{said}"
        if place.last is None:
            return f"has made no call there in its dump{said}"
        ago = (
            self._clock.written(place.dump) - self._clock.at(place.dump, place.last.finished_ns or place.last.started_ns)
        ) / 1e9
        return f"ended its last call, {describe(place.last)}, {max(ago, 0.0):.3g} s before its dump{said}"

    def faults(self) -> list[Finding]:
        """Communicators that were poisoned, and by what."""
        out: dict[str, tuple[dict[str, Any], str, list[int]]] = {}
        for lane in self.lanes:
            for p in lane.known:
                if p.group is not None and p.group.fault:
                    text = f"{lane.key} failed: {p.group.fault}"
                    ranks = out.setdefault(text, (_group(lane), text, []))[2]
                    ranks += [p.rank] if p.rank not in ranks else []
        return [Finding("fault", f"{text} (on {named(ranks)})", tuple(ranks), group) for group, text, ranks in out.values()]
