"""A page store that goes wrong on purpose: slow, failing, gone, or with a journal of what it acknowledged.

It stands between a cache and its real store on one rank, for the demo's ``--fault`` and for tests with processes.
"""

from __future__ import annotations

import json
import os
import random
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from commplane.api import PageStore, StoreContext, StoreDone, StoreUsage
from commplane.errors import ConfigError

__all__ = ["KINDS", "FaultyStore", "Journal", "parse_fault"]

KINDS = ("slow", "failing", "gone")


def parse_fault(text: str, ranks: int) -> tuple[str, int]:
    """``KIND@RANK`` as a pair.

    Raises:
        ConfigError: another form, an unknown kind, or no such rank.
    """
    kind, _, rank = text.partition("@")
    if kind not in KINDS or not rank.isdigit() or int(rank) >= ranks:
        raise ConfigError(f"fault {text!r}: wanted KIND@RANK with KIND of {', '.join(KINDS)} and RANK below {ranks}")
    return kind, int(rank)


class FaultyStore(PageStore):
    """Another store, spoilt.

    ``slow``
        every end comes `delay` seconds late.
    ``failing``
        a portion of the pages of each batch, drawn with `seed`, is said to be missing, or not stored.
    ``gone``
        from the `after`-th batch on every batch ends with an error and no page, as with a server that was lost.
    """

    def __init__(
        self, inner: PageStore, kind: str, *, delay: float = 0.05, portion: float = 0.3, after: int = 10, seed: int = 0
    ) -> None:
        if kind not in KINDS:
            raise ConfigError(f"fault: wanted one of {', '.join(KINDS)}, found {kind!r}")
        self._inner, self._kind = inner, kind
        self._delay, self._portion, self._after = delay, portion, after
        self._chance = random.Random(seed)
        self._submitted = 0
        self._tickets = 0
        self._open: dict[int, int] = {}  # the inner store's ticket -> ours
        self._ended: list[tuple[float, StoreDone]] = []  # when it may be told, in order of ending

    def open(self, context: StoreContext) -> None:
        """Open the real store."""
        self._inner.open(context)

    def submit_exists(self, keys: Sequence[bytes]) -> int:
        """As the real store."""
        return self._refused(len(keys)) or self._ours(self._inner.submit_exists(keys))

    def submit_get(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """As the real store."""
        return self._refused(len(keys)) or self._ours(self._inner.submit_get(keys, pages))

    def submit_put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """As the real store."""
        return self._refused(len(keys)) or self._ours(self._inner.submit_put(keys, pages))

    def submit_remove(self, keys: Sequence[bytes]) -> int:
        """As the real store."""
        return self._refused(len(keys)) or self._ours(self._inner.submit_remove(keys))

    def poll(self, timeout: float = 0.0) -> list[StoreDone]:
        """Ends that are due."""
        deadline = time.monotonic() + timeout
        while True:
            for done in self._inner.poll(0.0):
                late = self._delay if self._kind == "slow" else 0.0
                self._ended.append((time.monotonic() + late, self._spoilt(done)))
            now = time.monotonic()
            due = [done for when, done in self._ended if when <= now]
            self._ended = [(when, done) for when, done in self._ended if when > now]
            if due or now >= deadline:
                return due
            time.sleep(min(0.001, deadline - now))

    def usage(self) -> StoreUsage:
        """As the real store."""
        return self._inner.usage()

    def close(self) -> None:
        """Close the real store; what was still to be told is not told any more."""
        self._inner.close()

    def _refused(self, keys: int) -> int:
        """A ticket that has failed already if the store is gone, else 0. Tickets count from 1."""
        self._submitted += 1
        if self._kind != "gone" or self._submitted <= self._after:
            return 0
        self._tickets += 1
        self._ended.append((0.0, StoreDone(self._tickets, (False,) * keys, "the storage of this rank is gone (on purpose)")))
        return self._tickets

    def _ours(self, ticket: int) -> int:
        self._tickets += 1
        self._open[ticket] = self._tickets
        return self._tickets

    def _spoilt(self, done: StoreDone) -> StoreDone:
        ok, error = done.ok, done.error
        if self._kind == "failing":
            ok = tuple(o and self._chance.random() >= self._portion for o in ok)
            if ok != done.ok:
                error = error or "some pages failed (on purpose)"
        return StoreDone(self._open.pop(done.ticket), ok, error)


class Journal(PageStore):
    """Another store, with a file that says which pages it has acknowledged and which bytes were served.

    A line is written, and handed to the kernel, before the end of a batch is told: after ``kill -9`` the file has every page
    that the cache may have counted on. One JSON object a line: ``{"put" or "get": key in hex, "crc": of the page's bytes}``.
    """

    def __init__(self, inner: PageStore, path: Path) -> None:
        self._inner = inner
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._batches: dict[int, tuple[str, list[bytes], list[memoryview]]] = {}

    def open(self, context: StoreContext) -> None:
        """Open the real store."""
        self._inner.open(context)

    def submit_exists(self, keys: Sequence[bytes]) -> int:
        """As the real store."""
        return self._inner.submit_exists(keys)

    def submit_get(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """As the real store."""
        ticket = self._inner.submit_get(keys, pages)
        self._batches[ticket] = ("get", list(keys), list(pages))
        return ticket

    def submit_put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """As the real store."""
        ticket = self._inner.submit_put(keys, pages)
        self._batches[ticket] = ("put", list(keys), list(pages))
        return ticket

    def submit_remove(self, keys: Sequence[bytes]) -> int:
        """As the real store."""
        return self._inner.submit_remove(keys)

    def poll(self, timeout: float = 0.0) -> list[StoreDone]:
        """Ends, each one in the journal first."""
        ended = self._inner.poll(timeout)
        for done in ended:
            word, keys, pages = self._batches.pop(done.ticket, ("", [], []))
            lines = (
                [
                    json.dumps({word: key.hex(), "crc": zlib.crc32(page)})
                    for key, page, ok in zip(keys, pages, done.ok, strict=True)
                    if ok
                ]
                if word
                else []
            )
            if lines:
                os.write(self._file, ("\n".join(lines) + "\n").encode())
        return ended

    def usage(self) -> StoreUsage:
        """As the real store."""
        return self._inner.usage()

    def close(self) -> None:
        """Close the real store and the journal. Idempotent."""
        self._inner.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
