"""A page store in memory that is slow, fails and loses pages as its seed says: the same in every run, on no clock."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from commplane.api import PageStore, StoreContext, StoreDone, StoreUsage

__all__ = ["SeededStore"]


class SeededStore(PageStore):
    """A store in a dictionary. Time is the number of calls of `poll`.

    Args:
        seed: of everything that is drawn.
        delay: the most polls that a batch takes; each takes at least one.
        fail: portion of batches that fail as a whole.
        lose: portion of pages that are not found, read or stored, one by one.
        keep_bytes: whether pages' bytes are kept; without them a read page stays as it was.
    """

    def __init__(self, seed: int = 0, *, delay: int = 0, fail: float = 0.0, lose: float = 0.0, keep_bytes: bool = True) -> None:
        self._random = random.Random(seed)
        self._delay, self._fail, self._lose, self._keep = delay, fail, lose, keep_bytes
        self._pages: dict[bytes, bytes] = {}
        self._time = self._tickets = 0
        self._open: list[tuple[int, int, Callable[[], tuple[bool, ...]]]] = []  # when, ticket, what happens then

    def open(self, context: StoreContext) -> None:
        """Nothing to do: nothing outlives it."""

    def submit_exists(self, keys: Sequence[bytes]) -> int:
        """Answered in a later poll."""
        return self._submit(lambda: tuple(self._well() and key in self._pages for key in keys))

    def submit_get(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """Read in a later poll."""

        def read() -> tuple[bool, ...]:
            ok = tuple(self._well() and key in self._pages for key in keys)
            if self._keep:
                for there, key, page in zip(ok, keys, pages, strict=True):
                    if there:
                        page[:] = self._pages[key]
            return ok

        return self._submit(read)

    def submit_put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """Stored in a later poll."""

        def write() -> tuple[bool, ...]:
            ok = tuple(self._well() for _ in keys)
            for well, key, page in zip(ok, keys, pages, strict=True):
                if well:
                    self._pages[key] = bytes(page) if self._keep else b""
            return ok

        return self._submit(write)

    def submit_remove(self, keys: Sequence[bytes]) -> int:
        """Gone in a later poll."""
        return self._submit(lambda: tuple(self._pages.pop(key, b"") is not None for key in keys))

    def poll(self, timeout: float = 0.0) -> list[StoreDone]:
        """What is due. Never waits."""
        self._time += 1
        if not self._open:
            return []
        due = sorted(entry[:2] for entry in self._open if entry[0] <= self._time)
        if not due:
            return []
        act = {ticket: what for _, ticket, what in self._open}
        self._open = [entry for entry in self._open if entry[0] > self._time]
        return [self._done(ticket, act[ticket]) for _, ticket in due]

    def _done(self, ticket: int, what: Callable[[], tuple[bool, ...]]) -> StoreDone:
        ok = what()
        if self._fail and self._random.random() < self._fail:
            return StoreDone(ticket, (False,) * len(ok), "the batch failed, as the seed said")
        return StoreDone(ticket, ok)

    def _well(self) -> bool:
        return not self._lose or self._random.random() >= self._lose

    def _submit(self, what: Callable[[], tuple[bool, ...]]) -> int:
        self._tickets += 1
        self._open.append((self._time + 1 + (self._random.randint(0, self._delay) if self._delay else 0), self._tickets, what))
        return self._tickets

    def usage(self) -> StoreUsage:
        """What it holds."""
        return StoreUsage(len(self._pages), None)

    def close(self) -> None:
        """What is open is not told any more."""
        self._open.clear()
