"""The dumps of all ranks put side by side: who is where in each communicator. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from commplane.api import FlightRecord, GroupKey
from commplane.flight.read import Dump, GroupDump

__all__ = ["Clock", "Lane", "Place", "describe", "lanes", "named", "short"]


def describe(record: FlightRecord) -> str:
    """A call as people read it: ``#5 all_reduce(sum, float32, 64 bytes)``."""
    parts = [*filter(None, (record.op, record.dtype)), f"{record.nbytes} bytes"]
    return f"#{record.seq} {record.collective}({', '.join(parts if record.dtype else ())})"


def named(ranks: Sequence[int]) -> str:
    """``rank 1``, or ``ranks 0, 2``."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, sorted(ranks)))}"


def short(text: str, most: int = 200) -> str:
    """The beginning of a text on one line; errors of transports can be long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


class Clock:
    """One time for all ranks, in nanoseconds since 1970.

    Ranks of one machine share a monotonic clock, which is exact between them and does not jump; the wall clock, by which
    machines are laid side by side, is read once a machine.
    """

    def __init__(self, dumps: Sequence[Dump]) -> None:
        offsets: dict[str, list[int]] = {}
        for d in dumps:
            offsets.setdefault(d.domain, []).append(d.wall_ns - d.monotonic_ns)
        self._offset = {domain: median_low(values) for domain, values in offsets.items()}

    def at(self, dump: Dump, monotonic_ns: int) -> int:
        """A time of the monotonic clock of the rank that wrote `dump`."""
        return monotonic_ns + self._offset[dump.domain]

    def written(self, dump: Dump) -> int:
        """When `dump` was written."""
        return self.at(dump, dump.monotonic_ns)


@dataclass(frozen=True)
class Place:
    """Where one rank is among the calls of one lane.

    Attributes:
        rank: global rank.
        dump: its dump, or None if it left none.
        group: this communicator in its dump, or None if it was not open there.
        records: its calls, oldest first.
    """

    rank: int
    dump: Dump | None
    group: GroupDump | None
    records: tuple[FlightRecord, ...]

    @property
    def known(self) -> bool:
        """Whether its calls are known."""
        return self.group is not None

    @property
    def last(self) -> FlightRecord | None:
        """The last call it began."""
        return self.records[-1] if self.records else None

    @property
    def pending(self) -> FlightRecord | None:
        """The call that it has not finished: running, or failed."""
        return self.last if self.last is not None and self.last.state != "done" else None

    @property
    def began(self) -> int:
        """Number of the last call it began."""
        return 0 if self.last is None else self.last.seq

    @property
    def finished(self) -> int:
        """Number of the last call it finished; calls are made one after the other."""
        return self.began - (self.pending is not None)

    @property
    def seconds(self) -> float:
        """How long it was in the call that it has not finished."""
        if self.pending is None or self.dump is None:
            return 0.0
        end = self.dump.monotonic_ns if self.pending.finished_ns is None else self.pending.finished_ns
        return max(0.0, (end - self.pending.started_ns) / 1e9)


@dataclass(frozen=True)
class Lane:
    """One backend of one communicator, over all its ranks."""

    key: GroupKey
    instance: int
    backend: str
    places: Mapping[int, Place]

    @property
    def name(self) -> str:
        """``'tp' over [0, 1] on cpu, torch``; a communicator that was created again has its number."""
        again = f" (created {self.instance} times)" if self.instance > 1 else ""
        return f"{self.key}{again}, {self.backend}"

    @property
    def known(self) -> list[Place]:
        """The ranks whose calls are known."""
        return [p for p in self.places.values() if p.known]

    @property
    def finished(self) -> int:
        """Number of the last call that all known ranks finished."""
        return min((p.finished for p in self.known), default=0)

    def call(self, seq: int) -> FlightRecord | None:
        """A call by its number, from any rank that still holds it."""
        return next((r for p in self.known for r in p.records if r.seq == seq), None)

    def waiting_for(self, place: Place) -> tuple[int, ...]:
        """Global ranks that its backend was waiting for; empty where the backend cannot tell."""
        told = place.pending.waiting_for if place.pending is not None else ()
        return tuple(self.key.ranks[r] for r in told if 0 <= r < len(self.key.ranks))

    def difference(self) -> tuple[int, dict[str, list[int]]] | None:
        """The first number at which ranks made different calls, and which ranks made which; None if there is none."""
        by_seq: dict[int, dict[str, list[int]]] = {}
        for p in self.known:
            for r in p.records:
                by_seq.setdefault(r.seq, {}).setdefault(describe(r), []).append(p.rank)
        return next(((seq, calls) for seq, calls in sorted(by_seq.items()) if len(calls) > 1), None)


def lanes(dumps: Sequence[Dump]) -> list[Lane]:
    """Every backend of every communicator that some dump knows, in the order in which they are met."""
    by_rank = {d.rank: d for d in dumps}
    groups: dict[tuple[GroupKey, int], dict[int, GroupDump]] = {}
    backends: dict[tuple[GroupKey, int], dict[str, None]] = {}
    for d in dumps:
        for g in d.groups:
            groups.setdefault((g.key, g.instance), {})[d.rank] = g
            backends.setdefault((g.key, g.instance), {}).update(dict.fromkeys([*g.records, *g.problems]))
    out = []
    for (key, instance), members in groups.items():
        for backend in backends[key, instance]:
            places = {}
            for r in key.ranks:
                group = members.get(r)
                records = None if group is None else group.records.get(backend)
                places[r] = Place(r, by_rank.get(r), group if records is not None else None, records or ())
            out.append(Lane(key, instance, backend, places))
    return out
