"""The base of stores whose library blocks: worker threads, tickets, deadlines.

A batch is cut into parts, which the threads take from one queue. What a library does to a late batch cannot be stopped, so a part
asks (`Part.enter`) before it touches the caller's buffers, and a batch whose deadline has passed ends as soon as nobody has them
in hand: the pages are the caller's again, whatever the library does next.
"""

from __future__ import annotations

import queue
import threading
import time
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from commplane.api import PageStore, StoreContext, StoreDone
from commplane.errors import CommplaneWarning, ConfigError
from commplane_cache.stores.batch import Batch, Kind, Part
from commplane_cache.stores.options import read_options

__all__ = ["LONGEST_KEY", "ThreadedStore"]

LONGEST_KEY = 64
_WORTH_SHARING = 2 << 20
"""Bytes of a batch from which on all threads get a part of it; waking one costs as much as moving some hundred KiB."""


class ThreadedStore(PageStore):
    """What all stores of this package share. A store defines the methods that begin with ``do_``, which run in worker threads."""

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    """Its options with their defaults; the type of a default is that of the option. All have `threads`."""

    part_bytes: ClassVar[int] = 8 << 20
    part_keys: ClassVar[int] = 4096
    exists_at_once: ClassVar[int] = 0
    """Up to so many keys `do_exists` answers from memory: such a batch has ended when `submit_exists` returns."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ended: deque[StoreDone] = deque()
        self._out: dict[int, Batch] = {}
        self._queue: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running = 0
        self._next_ticket = 0
        self._state = "new"
        self._shut_error: BaseException | None = None
        self.page_bytes = 0
        self.timeout = 0.0

    # What a store defines.

    @abstractmethod
    def do_open(self, context: StoreContext, options: Mapping[str, Any]) -> None:
        """Open the library. Raises `CommplaneError` and then leaves nothing behind."""

    @abstractmethod
    def do_exists(self, part: Part) -> None:
        """Answer `part.done` for each key that is there."""

    @abstractmethod
    def do_get(self, part: Part) -> None:
        """Fill the pages that are there and unharmed."""

    @abstractmethod
    def do_put(self, part: Part) -> None:
        """Store what is not there; answer what is there at the end."""

    @abstractmethod
    def do_remove(self, part: Part) -> None:
        """Forget the keys; answer those that are gone."""

    @abstractmethod
    def do_shut(self) -> None:
        """Release the library. Runs once, in the last thread, when no part runs any more."""

    # The contract.

    def open(self, context: StoreContext) -> None:
        """See `PageStore`."""
        if self._state != "new":
            raise ConfigError(f"{self.name}: wanted a new store, found one that is {self._state}; make another one")
        if context.page_bytes < 1:
            raise ConfigError(f"{self.name}: wanted pages of at least one byte, found {context.page_bytes}")
        options = read_options(self.name, context.options, {"threads": 2, **self.defaults})
        if options["threads"] < 1:
            raise ConfigError(f"{self.name}: wanted at least one thread, found {options['threads']}")
        self.page_bytes, self.timeout = context.page_bytes, context.timeout
        self.do_open(context, options)
        self._state = "open"
        self._running = options["threads"]
        for index in range(options["threads"]):
            # A daemon: a process that ends without close must not wait for a library that hangs.
            thread = threading.Thread(target=self._work, name=f"commplane-{self.name}-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def submit_exists(self, keys: Sequence[bytes]) -> int:
        """See `PageStore`."""
        return self._submit("exists", keys, ())

    def submit_get(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """See `PageStore`."""
        return self._submit("get", keys, pages)

    def submit_put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """See `PageStore`."""
        return self._submit("put", keys, pages)

    def submit_remove(self, keys: Sequence[bytes]) -> int:
        """See `PageStore`."""
        return self._submit("remove", keys, ())

    def poll(self, timeout: float = 0.0) -> list[StoreDone]:
        """See `PageStore`."""
        if timeout <= 0 and not self._out and not self._ended:
            return []
        now = time.monotonic()
        limit = now + timeout
        with self._changed:
            while True:
                soonest = self._expire(now)
                if self._ended or now >= limit:
                    out = list(self._ended)
                    self._ended.clear()
                    return out
                self._changed.wait(min(limit, soonest) - now)
                now = time.monotonic()

    def close(self) -> None:
        """See `PageStore`. Warns of what went wrong; a thread that a library holds for longer than the timeout ends by itself."""
        if self._state != "open":
            self._state = "closed"
            return
        limit = time.monotonic() + self.timeout
        with self._changed:
            self._state = "closed"
            while self._out and (now := time.monotonic()) < limit:
                self._changed.wait(min(limit, self._expire(now)) - now)
            for batch in list(self._out.values()):
                if not batch.touching:
                    self._end(batch, f"{self.name}: closed before this batch of {len(batch.keys)} keys was over")
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        stuck = sum(thread.is_alive() for thread in self._threads)
        if stuck:
            warnings.warn(f"{self.name}: {stuck} threads did not end within {self.timeout:g} s", CommplaneWarning, stacklevel=2)
        elif self._shut_error is not None:
            warnings.warn(f"{self.name}: closing failed: {self._shut_error}", CommplaneWarning, stacklevel=2)

    @property
    def part_pages(self) -> int:
        """The most pages of a part."""
        return max(1, min(self.part_keys, self.part_bytes // self.page_bytes))

    # How it works.

    def _submit(self, kind: Kind, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        deadline = time.monotonic() + self.timeout
        with self._changed:
            self._next_ticket += 1
            batch = Batch(self._next_ticket, kind, tuple(keys), tuple(pages), deadline, self._changed)
            self._out[batch.ticket] = batch
            if self._state != "open":
                self._end(batch, f"{self.name}: wanted an open store, found one that is {self._state}; open another one")
            elif not batch.keys:
                self._end(batch, None)
            elif kind in ("get", "put") and len(batch.keys) != len(batch.pages):
                self._end(
                    batch, f"{self.name}: wanted a page for each key, found {len(batch.keys)} keys, {len(batch.pages)} pages"
                )
            if batch.over:
                return batch.ticket
            size = self._part_size(batch)
            starts = range(0, len(batch.keys), size)
            batch.parts_left = len(starts)
        if kind == "exists" and len(batch.keys) <= self.exists_at_once:
            self._answer(Part(batch, range(len(batch.keys)), [], []))
            return batch.ticket
        for start in starts:
            chosen = range(start, min(start + size, len(batch.keys)))
            self._queue.put(Part(batch, chosen, [], []))
        return batch.ticket

    def _part_size(self, batch: Batch) -> int:
        if not batch.pages:
            return self.part_keys
        count = len(batch.keys)
        if count * self.page_bytes < _WORTH_SHARING:
            return self.part_pages
        return min(self.part_pages, -(-count // len(self._threads)))

    def _answer(self, part: Part) -> None:
        if not part.is_over:
            self._run(part)
        with self._changed:
            part.batch.parts_left -= 1
            if not part.batch.parts_left and not part.batch.over:
                self._end(part.batch, part.batch.error)

    def _work(self) -> None:
        while (part := self._queue.get()) is not None:
            self._answer(part)
            del part  # the caller's buffers are not held while waiting
        with self._changed:
            self._running -= 1
            is_last = not self._running
        if is_last:
            try:
                self.do_shut()
            except Exception as error:  # told by close
                self._shut_error = error

    def _run(self, part: Part) -> None:
        self._choose(part)
        if not part.keys:
            return
        call = {"exists": self.do_exists, "get": self.do_get, "put": self.do_put, "remove": self.do_remove}[part.batch.kind]
        try:
            call(part)
        except Exception as error:  # whatever a library raises ends in the completion
            part.fail(f"{self.name}: {part.batch.kind} of {len(part.keys)} keys failed: {type(error).__name__}: {error}")

    def _choose(self, part: Part) -> None:
        """Take the keys and buffers that fit; say what is wrong with the others."""
        batch, chosen = part.batch, []
        for index in part.chosen:
            key: Any = batch.keys[index]
            if not isinstance(key, bytes) or not 1 <= len(key) <= LONGEST_KEY:
                part.fail(f"{self.name}: wanted keys of 1 to {LONGEST_KEY} bytes, found {key!r}")
                continue
            if batch.pages:
                page = self._page(part, batch.pages[index])
                if page is None:
                    continue
                part.pages.append(page)
            part.keys.append(key)
            chosen.append(index)
        part.chosen = chosen

    def _page(self, part: Part, given: Any) -> memoryview | None:
        try:
            page = memoryview(given).cast("B")
        except (TypeError, ValueError) as error:
            part.fail(f"{self.name}: wanted a page as contiguous bytes: {error}")
            return None
        if page.nbytes != self.page_bytes or (page.readonly and part.batch.kind == "get"):
            part.fail(
                f"{self.name}: wanted a {'writable ' if part.batch.kind == 'get' else ''}page of {self.page_bytes} bytes, "
                f"found {page.nbytes} {'read-only ' if page.readonly else ''}bytes"
            )
            return None
        return page

    def _expire(self, now: float) -> float:
        """End what is late and not in hand; when the next one will be late. Under the lock."""
        for batch in list(self._out.values()):
            if batch.deadline > now:
                return batch.deadline  # all have the same timeout, so those after it are later
            if not batch.touching:
                count = len(batch.keys)
                late = f"{self.name}: {batch.kind} of {count} keys is not over after {self.timeout:g} s"
                self._end(batch, batch.error or late)
        return float("inf")

    def _end(self, batch: Batch, error: str | None) -> None:
        """Tell the end. Under the lock."""
        batch.over = True
        del self._out[batch.ticket]
        self._ended.append(StoreDone(batch.ticket, tuple(batch.ok), error))
        self._changed.notify_all()
