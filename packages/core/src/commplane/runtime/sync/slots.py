"""Rows that go through slots in shared memory: sent by a copy, read when they are there, without a thread.

Each rank has two slots, for the odd and the even exchanges, and writes only those. Why no row is overwritten before all have read
it: the row of exchange k + 2 takes the place of that of k. A rank sends k + 2 only after it has read k + 1 from all, so all had
sent k + 1; and a rank sends k + 1 only after it has read k from all. So all have read k.

Python has no atomic loads and stores. A slot is the number of the exchange, the row, and a checksum over both; a reader copies
the slot and believes the copy if the number is the one that it waits for and the checksum is right. Whatever the order in which
the stores of another processor are seen, anything else is a row that is not there yet.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from select import select
from typing import Any
from zlib import crc32

from commplane.errors import PeerError
from commplane.runtime.communicator import Communicator

__all__ = ["Slots", "segment_bytes"]

# A cache line of most processors, twice: ranks do not write into what others write.
_LINE = 128
_WORD = 8
# What a wait does at first: this long it looks again and again and lets other threads and processes run in between.
_SPIN_S = 0.0001
# Then it sleeps, a quarter of what it has waited: a row that comes after t is read by 5/4 t, and at most so much later.
_LONGEST_SLEEP_S = 0.0002
# When it looks whether the ranks that are late are alive, and how often from then on.
_LOOK_AFTER_S = 0.02
_LOOK_EVERY_S = 0.05


def _slot_bytes(columns: int) -> int:
    return -(-(columns + 2) * _WORD // _LINE) * _LINE


def segment_bytes(columns: int, world_size: int) -> int:
    """Size of the segment for rows of `columns` numbers."""
    return world_size * (_LINE + 2 * _slot_bytes(columns))


class Slots:
    """One rank's view of the slots of a group.

    A rank that leaves says so in a line of its own, and ends the waits for what it has not sent; what it has sent stays.

    Args:
        columns: of a row.
        rank: group rank.
        ranks: global ranks in group order.
        memory: `segment_bytes` of shared memory, zeros when all ranks mapped it. It is closed with this object.
        timeout: seconds to wait for the rows of all.
        dead: which of the global ranks that it is given have ended.
        communicator: of the round, over the same ranks. Nothing is sent through it; faults and the close are told through it.
    """

    names_who_is_missing = True

    def __init__(
        self,
        columns: int,
        rank: int,
        ranks: Sequence[int],
        memory: mmap.mmap,
        timeout: float,
        dead: Callable[[Sequence[int]], Sequence[int]],
        communicator: Communicator,
    ) -> None:
        import numpy as np

        self.communicators: Sequence[Communicator] = (communicator,)
        self._rank, self._ranks = rank, tuple(ranks)
        self._timeout, self._dead = timeout, dead
        self._memory: mmap.mmap | None = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("q")
        self._sent = 0
        # What this rank sends: number, row, checksum; `buffer` is the row in it.
        self._row_bytes = columns * _WORD
        self._checked = self._row_bytes + _WORD
        self._whole = self._checked + _WORD
        self._mine = memoryview(bytearray(self._whole))
        self.buffer: Any = self._mine[_WORD : self._checked]
        self._found = memoryview(bytearray(self._whole))
        slot = _slot_bytes(columns)
        each = _LINE + 2 * slot
        self._flags = [r * each for r in range(len(ranks))]
        self._slots = [[r * each + _LINE + parity * slot for r in range(len(ranks))] for parity in (0, 1)]
        self._rows = np.zeros((len(ranks), columns), dtype=np.int64)
        self._into = [self._rows[r].data.cast("B") for r in range(len(ranks))]

    def send(self) -> None:
        """Put what is in `buffer` where the others find it. Local, does not wait."""
        number = self._sent + 1
        _PACK.pack_into(self._mine, 0, number)
        _PACK.pack_into(self._mine, self._checked, crc32(self._mine[: self._checked]))
        at = self._slots[number % 2][self._rank]
        self._bytes[at : at + self._whole] = self._mine
        self._sent = number

    def collect(self) -> Any:
        """The rows of all ranks of what was sent last, int64. Collective. May be called again if it was interrupted.

        Raises:
            PeerError: ranks have ended, left, or sent nothing within the deadline.
        """
        late = self._take(range(len(self._ranks)))
        if late:
            self._wait(late)
        return self._rows

    def exchange(self) -> Any:
        """`send`, then `collect`."""
        self.send()
        return self.collect()

    def _take(self, late: Sequence[int]) -> list[int]:
        """Read the rows of those of `late` that are there; the others are left."""
        number, slots, words, found = self._sent, self._slots[self._sent % 2], self._words, self._found
        left = []
        for r in late:
            at = slots[r]
            if words[at // _WORD] == number:
                found[:] = self._bytes[at : at + self._whole]
                # The number is looked at again: what was seen may be older than what was copied.
                if _ENDS(found, 0)[0] == number and _ENDS(found, self._checked)[0] == crc32(found[: self._checked]):
                    self._into[r][:] = found[_WORD : self._checked]
                    continue
            left.append(r)
        return left

    def _wait(self, late: list[int]) -> None:
        began = now = time.monotonic()
        deadline = began + self._timeout
        look_at = min(began + _LOOK_AFTER_S, deadline)
        while late:
            waited = now - began
            if waited < _SPIN_S:
                os.sched_yield()  # to other processes
                select([], [], [], 0)  # to other threads of this one; `time.sleep(0)` takes some 60 us before Python 3.13
            else:
                time.sleep(min(waited / 4, _LONGEST_SLEEP_S))
            late = self._take(late)
            now = time.monotonic()
            if late and now >= look_at:
                look_at = min(now + _LOOK_EVERY_S, max(deadline, now))
                late = self._look(late, now - began)

    def _look(self, late: list[int], waited: float) -> list[int]:
        """Those that are still late, all of which may come."""
        ended = self._dead([self._ranks[r] for r in late])
        gone = [r for r in late if self._words[self._flags[r] // _WORD]]
        late = self._take(late)  # again: who ended or left may have sent its row before
        for those, why in (
            ([self._ranks[r] for r in late if self._ranks[r] in ended], "the process of {} has ended"),
            ([self._ranks[r] for r in late if r in gone], "{} left the round"),
            ([self._ranks[r] for r in late if waited >= self._timeout], f"waited {self._timeout:g} s for {{}}"),
        ):
            if those:
                names = f"{'rank' if len(those) == 1 else 'ranks'} {', '.join(map(str, those))}"
                raise PeerError(why.format(names), those)
        return late

    def leave(self) -> None:
        """Tell the others that nothing more is sent. Local, idempotent."""
        if self._memory is not None:
            self._words[self._flags[self._rank] // _WORD] = 1

    def forget(self) -> None:
        """Give the memory back without a word, as a forked child has to. Local, idempotent."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self._words.release()
            self._bytes.release()
            memory.close()

    def close(self) -> None:
        """Leave and give the memory back. Local, idempotent."""
        self.leave()
        self.forget()


_PACK = struct.Struct("=q")
_ENDS = _PACK.unpack_from
