"""The rows of one group: who holds which place of the grid. Pure: the clock is passed in, nothing is sent or slept.

Ready is a statement about a set, not about a count: the keys of the rows are the grid that the rows declare. A registration that
is sent twice, late or out of order changes nothing that it has not changed before.

Who holds a row:

- nobody: whoever registers, unless that instance was replaced or has withdrawn there before;
- the same instance and epoch: the lease is renewed; the rest of the row must be what it was;
- a higher epoch takes the row over at once, and the old instance is refused from then on;
- another instance of the same epoch, or of a lower one, waits until the lease has ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from commplane_disagg.registry.feed import Feed
from commplane_disagg.registry.refusals import Claimed, OutOfGrid, Stale, TopologyConflict, UnknownRow
from commplane_disagg.wire import Change, Coordinate, Row, Tenure, Topology

__all__ = ["Held", "Table"]

_RETIRED = 65536
"""Former holders that are remembered, the oldest forgotten first."""


@dataclass
class Held:
    """A row and the moment, on the table's clock, at which its lease ends."""

    row: Row
    until: float


class Table:
    """One group. One thread calls it.

    Args:
        now: a monotonic clock, in seconds.
        lease: seconds that a row lives without renewal; one length for all, so that rows end in the order of their renewal.
        keep: changes that the feed holds.
        since: number of the last change before those of this table.
    """

    def __init__(self, now: Callable[[], float], lease: float = 10.0, keep: int = 4096, since: int = 0) -> None:
        self.lease = lease
        self.feed = Feed(keep, since)
        self.topology: Topology | None = None
        self._now = now
        self._held: OrderedDict[Coordinate, Held] = OrderedDict()  # in the order in which leases end
        self._lapsed: dict[Coordinate, Row] = {}  # last holder of a row that expired and that nobody has taken yet
        self._retired: OrderedDict[tuple[Coordinate, str, int], None] = OrderedDict()

    @property
    def held(self) -> Mapping[Coordinate, Held]:
        """The rows, as of the last call; `expire` first where that matters."""
        return self._held

    @property
    def ready(self) -> bool:
        """Whether every place of the grid has its row. Keys lie in the grid, or they would not be here."""
        return self.topology is not None and len(self._held) == self.topology.size

    def rows(self) -> tuple[Row, ...]:
        """By key."""
        return tuple(self._held[key].row for key in sorted(self._held))

    def missing(self, limit: int = 256) -> tuple[tuple[Coordinate, ...], int]:
        """Places without a row: the first of them, and how many there are. None while no rank has declared a grid."""
        if self.topology is None:
            return (), 0
        first: list[Coordinate] = []
        for key in self.topology.places():
            if len(first) == limit:
                break
            if key not in self._held:
                first.append(key)
        return tuple(first), self.topology.size - len(self._held)

    def register(self, topology: Topology, row: Row) -> Literal["registered", "renewed", "replaced"]:
        """Take or keep a row.

        Raises:
            OutOfGrid: the key is not in the topology.
            TopologyConflict: the rows that are here declared another one.
            Stale: this instance was replaced, has withdrawn, or its epoch is over.
            Claimed: the row is another instance's, or this instance registered it with other content.
        """
        self.expire()
        self._check_topology(topology, row)
        key, held = row.key, self._held.get(row.key)
        if (key, row.instance, row.epoch) in self._retired:
            raise Stale(
                f"row {key}: instance {row.instance} epoch {row.epoch} was replaced or has withdrawn; start with a new one"
            )
        if held is None:
            lapsed = self._lapsed.pop(key, None)
            if lapsed is not None and not _same_tenure(lapsed, row):
                self._retire(lapsed)
            self._put(topology, row)
            self._tell("registered", row)
            return "registered"
        if _same_tenure(held.row, row):
            self._check_content(held.row, row)
            self._renew(key, held)
            return "renewed"
        if row.epoch > held.row.epoch:
            previous = held.row.instance
            self._retire(held.row)
            self._put(topology, row)
            self._tell("replaced", row, previous)
            return "replaced"
        raise self._held_by_another(held, row)

    def renew(self, tenure: Tenure) -> Row:
        """Start the lease of a row anew: the row.

        Raises:
            Stale: the row is another instance's by now, or this one has withdrawn.
            UnknownRow: there is none; register again.
        """
        held = self._mine(tenure)
        self._renew(tenure.key, held)
        return held.row

    def withdraw(self, tenure: Tenure) -> None:
        """Give a row up. This instance and epoch cannot take it again: a registration of theirs that is still on its way is late.

        Raises:
            Stale, UnknownRow: as `renew`; it cannot take the row again all the same.
        """
        try:
            held = self._mine(tenure)
        finally:
            self._retire(tenure)
        del self._held[tenure.key]
        self._tell("withdrawn", held.row)
        self._forget_topology()

    def expire(self) -> int:
        """Drop the rows whose lease has ended: how many."""
        now, count = self._now(), 0
        while self._held:
            key, held = next(iter(self._held.items()))
            if held.until > now:
                break
            del self._held[key]
            self._lapsed[key] = held.row
            self._tell("expired", held.row)
            count += 1
        if count:
            self._forget_topology()
        return count

    def next_expiry(self) -> float | None:
        """Seconds until the first lease ends; None without rows."""
        if not self._held:
            return None
        return max(0.0, next(iter(self._held.values())).until - self._now())

    def _check_topology(self, topology: Topology, row: Row) -> None:
        if row.key not in topology:
            sizes = f"dp {topology.dp}, cp {topology.cp}, tp {topology.tp}, pp {topology.pp}"
            raise OutOfGrid(f"row {row.key} is not in the grid that it declares: {sizes}")
        if self.topology is None or not self._held or topology == self.topology:
            return
        pairs = self.topology.difference(topology)
        words = ", ".join(f"{name} {mine!r} != {theirs!r}" for name, (mine, theirs) in pairs.items())
        newer = all(row.epoch > held.row.epoch for held in self._held.values())
        raise TopologyConflict(
            f"row {row.key} declares another topology than the {len(self._held)} registered rows (registered != declared): "
            f"{words}; start all ranks of a group with the same settings",
            difference={name: (repr(mine), repr(theirs)) for name, (mine, theirs) in pairs.items()},
            # Ranks that were all restarted with other settings have to wait for the leases of those that were before them.
            retry_after=max(held.until for held in self._held.values()) - self._now() if newer else None,
        )

    def _check_content(self, known: Row, row: Row) -> None:
        if known == row:
            return
        fields = [name for name in row.__struct_fields__ if getattr(known, name) != getattr(row, name)]
        difference = {name: (_short(getattr(known, name)), _short(getattr(row, name))) for name in fields}
        raise Claimed(
            f"row {row.key}: instance {row.instance} epoch {row.epoch} registered it with another {' and '.join(fields)} before; "
            "a changed row wants a higher epoch",
            difference=difference,
        )

    def _held_by_another(self, held: Held, row: Row) -> Claimed | Stale:
        left, holder = held.until - self._now(), held.row
        where = f"{holder.host}:{holder.port}"
        kind = Stale if row.epoch < holder.epoch else Claimed
        return kind(
            f"row {row.key} is held by instance {holder.instance} epoch {holder.epoch} at {where} for {left:.1f} s more, and "
            f"claimed by instance {row.instance} epoch {row.epoch}: stop one of the two, or give the newer a higher epoch",
            retry_after=left,
        )

    def _mine(self, tenure: Tenure) -> Held:
        self.expire()
        held = self._held.get(tenure.key)
        who = f"instance {tenure.instance} epoch {tenure.epoch}"
        if held is not None and (held.row.instance, held.row.epoch) == (tenure.instance, tenure.epoch):
            return held
        if (tenure.key, tenure.instance, tenure.epoch) in self._retired:
            raise Stale(f"row {tenure.key}: {who} was replaced or has withdrawn")
        if held is not None:
            raise Stale(f"row {tenure.key} is held by instance {held.row.instance} epoch {held.row.epoch}, not by {who}")
        raise UnknownRow(f"there is no row {tenure.key}: its lease has ended or the registry was restarted; register again")

    def _put(self, topology: Topology, row: Row) -> None:
        self.topology = topology
        self._held[row.key] = Held(row, self._now() + self.lease)
        self._held.move_to_end(row.key)

    def _renew(self, key: Coordinate, held: Held) -> None:
        held.until = self._now() + self.lease
        self._held.move_to_end(key)

    def _retire(self, holder: Row | Tenure) -> None:
        self._retired[holder.key, holder.instance, holder.epoch] = None
        if len(self._retired) > _RETIRED:
            self._retired.popitem(last=False)

    def _forget_topology(self) -> None:
        if not self._held:
            self.topology = None

    def _tell(self, kind: Literal["registered", "replaced", "withdrawn", "expired"], row: Row, previous: str = "") -> None:
        shown = row if kind in ("registered", "replaced") else None
        self.feed.add(
            Change(
                sequence=self.feed.sequence + 1,
                kind=kind,
                key=row.key,
                instance=row.instance,
                epoch=row.epoch,
                previous=previous,
                row=shown,
            )
        )


def _same_tenure(one: Row, other: Row) -> bool:
    return (one.instance, one.epoch) == (other.instance, other.epoch)


def _short(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else text[:77] + "..."
