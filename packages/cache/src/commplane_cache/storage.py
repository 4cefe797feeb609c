"""The cache's end of a page store: what was submitted, and whom to tell. Local; nothing here waits or raises."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from commplane.api import PageStore
from commplane_cache.tiers import HostTier
from commplane_cache.work import Work

__all__ = ["StoreLink"]

Told = Callable[[Sequence[bool], "str | None"], None]


class StoreLink:
    """Submissions to one store.

    A store that raises after `open` breaks its contract; since the other ranks' stores may be well, that is a failure of this
    batch like any other, and `last_error` says what it was.

    Attributes:
        last_error: the last thing that went wrong here, or None.
        writer: whether this rank writes; where several hold the same bytes, one is enough.
    """

    def __init__(self, store: PageStore, host: HostTier, *, writer: bool = True) -> None:
        self._store, self._host, self.writer = store, host, writer
        self._open: dict[int, tuple[int, Told]] = {}
        self.last_error: str | None = None

    def __len__(self) -> int:
        return len(self._open)

    def exists(self, keys: Sequence[bytes], told: Told) -> None:
        """Ask which of `keys` are there."""
        self._submit(lambda: self._store.submit_exists(keys), len(keys), told)

    def get(self, keys: Sequence[bytes], pages: np.ndarray, told: Told) -> None:
        """Read into host pages."""
        self._submit(lambda: self._store.submit_get(keys, self._host.views(pages)), len(keys), told)

    def put(self, keys: Sequence[bytes], pages: np.ndarray, work: Work) -> None:
        """Write host pages; `work` is told."""

        def told(ok: Sequence[bool], error: str | None) -> None:
            work.end(None if all(ok) else error or f"{len(ok) - sum(ok)} of {len(ok)} pages were not stored")

        if self.writer:
            self._submit(lambda: self._store.submit_put(keys, self._host.views(pages)), len(keys), told)
        else:
            work.end()

    def poll(self) -> None:
        """Tell whose batches have ended."""
        if not self._open:
            return
        try:
            ends = self._store.poll(0.0)
        except Exception as error:  # the batches stay open: their buffers may still be in use
            self.last_error = f"{type(error).__name__}: {error}"
            return
        for end in ends:
            count, told = self._open.pop(end.ticket, (0, None))
            if end.error is not None:
                self.last_error = end.error
            if told is None:
                continue
            if len(end.ok) == count:
                told(end.ok, end.error)
            else:
                words = f"the store answered for {len(end.ok)} of {count} pages" + (f": {end.error}" if end.error else "")
                self.last_error = words
                told((False,) * count, words)

    def wait(self, timeout: float) -> bool:
        """Poll until nothing is open, at most `timeout` seconds: whether that came."""
        deadline = time.monotonic() + timeout
        while self._open:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(0.001, left))
            self.poll()
        return True

    def _submit(self, call: Callable[[], int], count: int, told: Told) -> None:
        try:
            ticket = call()
        except Exception as error:
            self.last_error = f"{type(error).__name__}: {error}"
            told((False,) * count, self.last_error)
        else:
            self._open[ticket] = count, told
