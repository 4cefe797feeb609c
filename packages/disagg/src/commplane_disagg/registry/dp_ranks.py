"""Which data-parallel rank serves a room, for decode ranks that only know the room. Pure: the clock is passed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from commplane_disagg.registry.refusals import Full, RoomConflict
from commplane_disagg.wire import DpRank

__all__ = ["DpRankTable"]


class DpRankTable:
    """Rooms of one group. One thread calls it.

    Args:
        now: a monotonic clock, in seconds.
        lifetime: seconds after which an entry is forgotten; saying it again starts them anew.
        limit: entries at most.
    """

    def __init__(self, now: Callable[[], float], lifetime: float = 120.0, limit: int = 1 << 20) -> None:
        self._now, self._lifetime, self._limit = now, lifetime, limit
        self._rooms: OrderedDict[int, tuple[DpRank, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rooms)

    def register(self, entries: Iterable[DpRank]) -> None:
        """Store all of them or none. One of a lower generation than is known is late and changes nothing.

        Raises:
            RoomConflict: the same generation of a room is another rank's.
            Full: there are too many rooms.
        """
        self.expire()
        newer: dict[int, DpRank] = {}
        for entry in entries:
            known = newer.get(entry.room) or self._known(entry.room)
            if known is not None and known.generation == entry.generation and known.dp != entry.dp:
                raise RoomConflict(
                    f"room {entry.room} generation {entry.generation} is served by dp rank {known.dp}, and claimed by dp rank "
                    f"{entry.dp}: give a room that moves a higher generation",
                    difference={"dp": (str(known.dp), str(entry.dp))},
                )
            if known is None or known.generation <= entry.generation:
                newer[entry.room] = entry
        if len(self._rooms) + sum(room not in self._rooms for room in newer) > self._limit:
            raise Full(f"the registry holds {self._limit} rooms at most; they are forgotten after {self._lifetime:g} s")
        until = self._now() + self._lifetime
        for room, entry in newer.items():
            self._rooms[room] = (entry, until)
            self._rooms.move_to_end(room)

    def query(self, rooms: Iterable[int]) -> tuple[DpRank, ...]:
        """Those that are known."""
        self.expire()
        return tuple(known for room in rooms if (known := self._known(room)) is not None)

    def expire(self) -> None:
        """Forget what is too old."""
        now = self._now()
        while self._rooms:
            room, (_, until) = next(iter(self._rooms.items()))
            if until > now:
                return
            del self._rooms[room]

    def _known(self, room: int) -> DpRank | None:
        found = self._rooms.get(room)
        return found[0] if found else None
