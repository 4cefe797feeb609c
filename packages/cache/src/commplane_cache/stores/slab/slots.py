"""Which page is in which slot, in the order of use; who reads a slot just now; which slot is next.

In memory only; the log makes it last. Not thread-safe.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from commplane_cache.stores.slab.record import Record

__all__ = ["Piece", "Slots"]


@dataclass(frozen=True)
class Piece:
    """What is in neighbouring slots: for each its page's name, or None; when that was used last (a count); its checksum."""

    names: list[bytes | None]
    used: array[int]
    sums: array[int]


class Slots:
    """Names, least recently used first. "Used" is a get or a put; the clock is the order of calls."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # name -> slot
        # Of each slot that was ever used; those from here on were not.
        self._names: list[bytes | None] = []
        self._used = array("Q")
        self._sums = array("Q")
        self._clock = 0
        self._free: list[int] = []
        self._readers: dict[int, int] = {}
        self._leaving: set[int] = set()  # free as soon as nobody reads them

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, name: bytes) -> bool:
        return name in self._pages

    def items(self) -> Iterator[tuple[bytes, int, int]]:
        """Name, slot and checksum, least recently used first."""
        return ((name, slot, self._sums[slot]) for name, slot in self._pages.items())

    def piece(self, first: int, count: int) -> Piece:
        """A copy of what is said of up to `count` slots from `first` on; of none behind the last one that was ever used."""
        end = first + count
        return Piece(self._names[first:end], self._used[first:end], self._sums[first:end])

    def _touch(self, name: bytes, slot: int) -> None:
        self._pages.move_to_end(name)
        self._clock += 1
        self._used[slot] = self._clock

    def _place(self, name: bytes, slot: int, checksum: int) -> None:
        self._pages[name] = slot
        self._names[slot], self._sums[slot] = name, checksum
        self._touch(name, slot)

    def _take_out(self, name: bytes) -> int:
        slot = self._pages.pop(name)
        self._names[slot] = None
        return slot

    def _add_slots(self, count: int) -> None:
        self._names += [None] * count
        self._used.frombytes(bytes(8 * count))
        self._sums.frombytes(bytes(8 * count))

    # Recovery.

    def restore(self, records: list[Record]) -> None:
        """Take over what a log says; the last word about a slot or a name holds. Slots above the capacity are left out."""
        holder: dict[int, bytes] = {}
        pages: dict[bytes, tuple[int, int]] = {}
        for record in records:
            before = holder.pop(record.slot, None)
            if before is not None and pages.get(before, (-1, 0))[0] == record.slot:
                del pages[before]
            if record.name and record.slot < self.capacity:
                holder[record.slot] = record.name
                pages.pop(record.name, None)  # to the end of the order
                pages[record.name] = (record.slot, record.checksum)
        self._add_slots(max((slot for slot, _ in pages.values()), default=-1) + 1)
        for name, (slot, checksum) in pages.items():
            self._place(name, slot, checksum)
        self._free = [slot for slot in range(len(self._names) - 1, -1, -1) if self._names[slot] is None]

    # Reading.

    def pin(self, name: bytes) -> tuple[int, int] | None:
        """Slot and checksum of a page that is going to be read, until `unpin`; it counts as used. None if it is not there."""
        slot = self._pages.get(name)
        if slot is None:
            return None
        self._touch(name, slot)
        self._readers[slot] = self._readers.get(slot, 0) + 1
        return slot, self._sums[slot]

    def unpin(self, slot: int) -> None:
        """One reader fewer."""
        left = self._readers.pop(slot) - 1
        if left:
            self._readers[slot] = left
        elif slot in self._leaving:
            self._leaving.remove(slot)
            self._free.append(slot)

    # Writing. A slot taken belongs to its writer until `commit` or `release`.

    def take(self, count: int) -> list[tuple[int, bool]]:
        """Up to `count` slots to write to: each with whether a page had to go for it. Fewer if the rest is being read."""
        taken: list[tuple[int, bool]] = []
        while len(taken) < count:
            if self._free:
                taken.append((self._free.pop(), False))
            elif len(self._names) < self.capacity:
                taken.append((len(self._names), False))
                self._add_slots(1)
            else:
                break
        missing = count - len(taken)
        if missing:
            victims = list(islice((name for name, slot in self._pages.items() if slot not in self._readers), missing))
            taken += [(self._take_out(name), True) for name in victims]
        return taken

    def commit(self, name: bytes, slot: int, checksum: int) -> None:
        """The page, which has no slot yet, is in this one."""
        assert name not in self._pages
        self._place(name, slot, checksum)

    def use(self, name: bytes) -> bool:
        """Whether the page is there; if so, it counts as used."""
        slot = self._pages.get(name)
        if slot is None:
            return False
        self._touch(name, slot)
        return True

    def drop(self, name: bytes, slot: int | None = None) -> int | None:
        """Forget a page (if it is in `slot`, where one is given): its slot, which is the caller's until `release`."""
        found = self._pages.get(name)
        if found is None or slot not in (None, found):
            return None
        return self._take_out(name)

    def release(self, slot: int) -> None:
        """The slot may be taken again, once nobody reads it."""
        if slot in self._readers:
            self._leaving.add(slot)
        else:
            self._free.append(slot)
