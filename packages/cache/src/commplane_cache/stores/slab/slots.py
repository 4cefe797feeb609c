"""Which page is in which slot, in the order of use; who reads a slot just now; which slot is next.

In memory only; the log makes it last. Not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from commplane_cache.stores.slab.record import Record

__all__ = ["Slots"]


class Slots:
    """Names, least recently used first. "Used" is a get or a put; the clock is the order of calls."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._pages: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # name -> slot, checksum
        self._free: list[int] = []
        self._untouched = 0  # slots from here on were never used
        self._readers: dict[int, int] = {}
        self._leaving: set[int] = set()  # free as soon as nobody reads them

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, name: bytes) -> bool:
        return name in self._pages

    def items(self) -> Iterator[tuple[bytes, int, int]]:
        """Name, slot and checksum, least recently used first."""
        return ((name, slot, checksum) for name, (slot, checksum) in self._pages.items())

    # Recovery.

    def restore(self, records: list[Record]) -> None:
        """Take over what a log says; the last word about a slot or a name holds. Slots above the capacity are left out."""
        holder: dict[int, bytes] = {}
        for record in records:
            before = holder.pop(record.slot, None)
            if before is not None and self._pages.get(before, (-1, 0))[0] == record.slot:
                del self._pages[before]
            if record.name and record.slot < self.capacity:
                holder[record.slot] = record.name
                self._pages.pop(record.name, None)  # to the end of the order
                self._pages[record.name] = (record.slot, record.checksum)
        used = {slot for slot, _ in self._pages.values()}
        self._untouched = max(used, default=-1) + 1
        self._free = [slot for slot in range(self._untouched - 1, -1, -1) if slot not in used]

    # Reading.

    def pin(self, name: bytes) -> tuple[int, int] | None:
        """Slot and checksum of a page that is going to be read, until `unpin`; it counts as used. None if it is not there."""
        found = self._pages.get(name)
        if found is not None:
            self._pages.move_to_end(name)
            self._readers[found[0]] = self._readers.get(found[0], 0) + 1
        return found

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
            elif self._untouched < self.capacity:
                taken.append((self._untouched, False))
                self._untouched += 1
            else:
                break
        missing = count - len(taken)
        if missing:
            victims: list[tuple[bytes, int]] = []
            for name, (slot, _) in self._pages.items():
                if slot not in self._readers:
                    victims.append((name, slot))
                    if len(victims) == missing:
                        break
            for name, slot in victims:
                del self._pages[name]
                taken.append((slot, True))
        return taken

    def commit(self, name: bytes, slot: int, checksum: int) -> None:
        """The page, which has no slot yet, is in this one."""
        assert name not in self._pages
        self._pages[name] = (slot, checksum)

    def use(self, name: bytes) -> bool:
        """Whether the page is there; if so, it counts as used."""
        if name in self._pages:
            self._pages.move_to_end(name)
            return True
        return False

    def drop(self, name: bytes, slot: int | None = None) -> int | None:
        """Forget a page (if it is in `slot`, where one is given): its slot, which is the caller's until `release`."""
        found = self._pages.get(name)
        if found is None or slot not in (None, found[0]):
            return None
        del self._pages[name]
        return found[0]

    def release(self, slot: int) -> None:
        """The slot may be taken again, once nobody reads it."""
        if slot in self._readers:
            self._leaving.add(slot)
        else:
            self._free.append(slot)
