"""The store `slab`: the data file, the log and the slots put together.

What makes it safe. A page is written to a slot that no record names, then its record is appended, then the put is acknowledged:
an acknowledged page is in the kernel (with `sync` on the device) together with its record. Before a slot is used again its old
record is taken back in the log. And whatever the order of writes turns out to be after a power failure, a page is served only if
its bytes have the checksum that its record says, so a torn, stale or damaged page is a miss.

Locks: `_log_lock` before `_lock`; no input or output under `_lock`.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import xxhash

from commplane.api import StoreContext, StoreUsage
from commplane.errors import CommplaneError, CommplaneWarning, ConfigError
from commplane_cache.stores.batch import Part
from commplane_cache.stores.slab.file import SlotFile
from commplane_cache.stores.slab.lock import FolderLock
from commplane_cache.stores.slab.log import Log, sync_folder
from commplane_cache.stores.slab.record import Header, Record, free_record, put_record
from commplane_cache.stores.slab.slots import Slots
from commplane_cache.stores.slab.snapshot import in_order
from commplane_cache.stores.threaded import ThreadedStore

__all__ = ["SlabStore"]

_RUN_BYTES = 1 << 20
"""Pages moved by one call and then summed: small enough to be in the core's own cache still."""


class SlabStore(ThreadedStore):
    """Pages in one file of this machine, for one process at a time.

    Options: `path` of a folder; room for `capacity_pages`, or `capacity_bytes`; `sync`: a put is acknowledged when it is on the
    device; `direct`: past the kernel's page cache (O_DIRECT), for stores larger than memory; `reserve`: take the room on the
    device at open; `threads`.

    Pages go between the file and the caller's buffers without a copy, so a batch that is late just while the kernel moves a part
    of it ends when that call returns.
    """

    name = "slab"
    exists_at_once = 1024
    defaults: ClassVar[Mapping[str, Any]] = {
        "path": "",
        "capacity_pages": 0,
        "capacity_bytes": 4 << 30,
        "sync": False,
        "direct": False,
        "reserve": False,
    }

    def do_open(self, context: StoreContext, options: Mapping[str, Any]) -> None:
        """See `ThreadedStore`."""
        if not options["path"]:
            raise ConfigError("slab: wanted a folder of its own, found none; set the option path")
        folder = Path(options["path"]).absolute()
        capacity = options["capacity_pages"] or options["capacity_bytes"] // context.page_bytes
        if capacity < 1:
            raise ConfigError(f"slab: wanted room for a page, found {options['capacity_bytes']} bytes; set capacity_pages")
        self._namespace = hashlib.sha256(context.namespace.encode()).digest()[:16]
        self._lock, self._log_lock = threading.Lock(), threading.Lock()
        self._slots = Slots(capacity)
        self._sync = options["sync"]
        self._was_read = False
        with ExitStack() as opened:
            try:
                new = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(0o700, parents=True, exist_ok=True)  # pages say what was in the prompts
                opened.callback(FolderLock(folder, "slab").close)
                self._log = Log(folder / "index", Header(context.page_bytes), sync=self._sync, who="slab")
                opened.callback(self._log.close)
                self._file = SlotFile(folder / "pages", context.page_bytes, direct=options["direct"])
                opened.callback(self._file.close)
                self._recover()
                self._file.cut(capacity)
                if options["reserve"]:
                    self._file.reserve(capacity)
                if self._sync:  # a page on the device is lost if the name of its file is not there
                    for named in (folder, *(path.parent for path in new)):
                        sync_folder(named)
            except OSError as error:
                raise CommplaneError(f"slab: {folder} cannot be opened: {error}") from error
            if self._file.refused is not None:
                warnings.warn(f"slab: O_DIRECT is not used: {self._file.refused}", CommplaneWarning, stacklevel=3)
            self._opened = opened.pop_all()

    def _recover(self) -> None:
        found: list[Record] = []
        self._log.replay(found.append)
        self._slots.restore(found)
        self._shorten_log()

    def usage(self) -> StoreUsage:
        """Of the whole file, all namespaces."""
        return StoreUsage(len(self._slots), self._slots.capacity)

    def do_exists(self, part: Part) -> None:
        """See `ThreadedStore`."""
        with self._lock:
            for index, key in enumerate(part.keys):
                if self._namespace + key in self._slots:
                    part.done(index)

    # Reading.

    def do_get(self, part: Part) -> None:
        """See `ThreadedStore`."""
        if not part.enter():
            return
        with self._lock:
            names = [self._namespace + key for key in part.keys]
            found = [(index, *place) for index, name in enumerate(names) if (place := self._slots.pin(name)) is not None]
            self._was_read = self._was_read or bool(found)
        bad: list[tuple[bytes, int]] = []
        try:
            for run in self._runs(sorted(found, key=lambda entry: entry[1])):
                pages = [part.pages[index] for index, _, _ in run]
                try:
                    whole = self._file.read(run[0][1], pages)
                except OSError as error:
                    part.fail(f"slab: reading slots {run[0][1]} to {run[-1][1]} failed: {error}")
                    continue
                for at, (index, slot, checksum) in enumerate(run):
                    if at < whole and xxhash.xxh3_64_intdigest(pages[at]) == checksum:
                        part.done(index)
                    else:
                        what = "is damaged" if at < whole else "lies behind the end of the file, which was cut"
                        part.fail(f"slab: the page in slot {slot} {what}; it is forgotten")
                        bad.append((names[index], slot))
        finally:
            part.leave()
            with self._lock:
                # Before the slots may be used again: a new page of the same name in the same slot is not the bad one.
                dropped = [slot for name, slot in bad if self._slots.drop(name, slot) is not None]
                for _, slot, _ in found:
                    self._slots.unpin(slot)
        if dropped:
            self._free(dropped)

    def _runs(self, entries: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
        """Cut (index, slot, checksum), sorted by slot, into neighbours that one call moves."""
        longest = max(1, _RUN_BYTES // self.page_bytes)
        for _, group in groupby(enumerate(entries), key=lambda entry: entry[1][1] - entry[0]):
            run = [entry for _, entry in group]
            for start in range(0, len(run), longest):
                yield run[start : start + longest]

    def _free(self, slots: list[int]) -> None:
        """Slots that no name points to are taken back in the log, then may be used again."""
        try:
            self._append([free_record(slot) for slot in slots])
        finally:  # the record is tidiness, the checksum is what protects
            with self._lock:
                for slot in slots:
                    self._slots.release(slot)

    def do_remove(self, part: Part) -> None:
        """See `ThreadedStore`."""
        with self._lock:
            dropped = [slot for key in part.keys if (slot := self._slots.drop(self._namespace + key)) is not None]
        if dropped:
            self._free(dropped)
        for index in range(len(part.keys)):
            part.done(index)

    # Writing.

    def do_put(self, part: Part) -> None:
        """See `ThreadedStore`."""
        names = [self._namespace + key for key in part.keys]
        missing: dict[bytes, int] = {}
        with self._lock:
            for index, name in enumerate(names):
                if not self._slots.use(name):
                    missing.setdefault(name, index)
            taken = self._slots.take(len(missing))
        mine = {slot for slot, _ in taken}
        try:
            # Before anything is written over, the log says that it is gone.
            evicted = [free_record(slot) for slot, had_page in taken if had_page]
            if evicted:
                self._append(evicted)
            if len(taken) < len(missing):
                part.fail(
                    f"slab: wanted {len(missing)} slots, found {len(taken)} of {self._slots.capacity}, the others are in use; "
                    f"put fewer pages at a time or give it more room"
                )
            stored = self._write(part, list(missing.items())[: len(taken)], sorted(mine))
            self._commit(stored, mine)
        finally:
            with self._lock:
                for slot in mine:
                    self._slots.release(slot)
                for index, name in enumerate(names):
                    if name in self._slots:
                        part.done(index)

    def _write(self, part: Part, items: list[tuple[bytes, int]], slots: list[int]) -> list[tuple[bytes, int, int]]:
        """Write pages to slots: name, slot and checksum of those that are whole."""
        stored: list[tuple[bytes, int, int]] = []
        if not part.enter():
            return stored
        try:
            for run in self._runs([(at, slot, 0) for at, slot in enumerate(slots)]):
                pages = [part.pages[items[at][1]] for at, _, _ in run]
                sums = [xxhash.xxh3_64_intdigest(page) for page in pages]
                try:
                    self._file.write(run[0][1], pages)
                except OSError as error:
                    part.fail(f"slab: writing slots {run[0][1]} to {run[-1][1]} failed: {error}")
                    continue
                stored += [(items[at][0], slot, checksum) for (at, slot, _), checksum in zip(run, sums, strict=True)]
        finally:
            part.leave()
        if self._sync and stored:
            self._file.sync()
        return stored

    def _commit(self, stored: list[tuple[bytes, int, int]], mine: set[int]) -> None:
        """From here on the pages are found, also after a crash; their slots are no longer the writer's."""
        if not stored:
            return
        with self._log_lock:
            with self._lock:  # another batch may have been faster with the same page; nobody commits beside us
                new = [entry for entry in stored if entry[0] not in self._slots]
            self._log.append(put_record(slot, name, checksum) for name, slot, checksum in new)
            with self._lock:
                for name, slot, checksum in new:
                    self._slots.commit(name, slot, checksum)
        mine.difference_update(slot for _, slot, _ in new)
        self._shorten_log()

    # The log.

    def _append(self, records: list[bytes]) -> None:
        with self._log_lock:
            self._log.append(records)

    def _shorten_log(self) -> None:
        with self._log_lock:
            if self._log.is_mostly_history(len(self._slots)):
                # Nobody commits while we have the log; who drops a page meanwhile says so in it after us.
                self._log.rewrite(in_order(self._slots, self._lock))

    def do_shut(self) -> None:
        """See `ThreadedStore`."""
        try:
            if self._was_read:
                # So that the order of use is that of the next process, too. After a kill it is the order of the puts.
                self._log.rewrite(self._slots.items())
        finally:
            self._opened.close()
