"""The log file of a slab: replayed at open, appended to, written anew when most of it is history."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from commplane.errors import CommplaneError
from commplane_cache.stores.slab.record import HEADER_BYTES, RECORD_BYTES, Header, Record, put_record, records

__all__ = ["Log", "sync_folder"]

_SLACK = 4096
"""Records of history that are never worth a new file."""
_AT_ONCE = 16384
"""Records written by one call: few enough that other threads run in between."""


class Log:
    """Not thread-safe. An append is whole in the kernel when it returns; with `sync` also on the device."""

    def __init__(self, path: Path, header: Header, *, sync: bool, who: str) -> None:
        """Open or create. Nobody else may have the folder.

        Raises:
            CommplaneError: the file is not a log, or of pages of another size.
        """
        self._path, self._header, self._sync = path, header, sync
        self._has_torn_tail = False
        path.with_suffix(".new").unlink(missing_ok=True)  # of a process that was killed in `rewrite`
        self._not_before = 0  # so many records: after a rewrite that failed, not each append tries again
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._fd, self._end = self._write_new(())
            try:
                sync_folder(path.parent)
            except BaseException:
                os.close(self._fd)
                raise
            return
        try:
            found = Header.unpack(os.pread(self._fd, HEADER_BYTES, 0))
            if found is None:
                raise CommplaneError(f"{who}: {path} is not the index of a slab, or its head is damaged; remove the folder")
            if found != header:
                raise CommplaneError(
                    f"{who}: wanted pages of {header.page_bytes} bytes, found pages of {found.page_bytes} in {path.parent}; "
                    f"give another folder, or remove this one"
                )
            self._end = os.fstat(self._fd).st_size
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def records(self) -> int:
        """In the file."""
        return (self._end - HEADER_BYTES) // RECORD_BYTES

    def replay(self, apply: Callable[[Record], None]) -> int:
        """Give every record that is whole to `apply`, in order, and forget a torn tail; how many were damaged."""
        size = self.records * RECORD_BYTES
        self._end = HEADER_BYTES + size
        damaged = at = 0
        while at < size:
            data = os.pread(self._fd, min(size - at, 65536 * RECORD_BYTES), HEADER_BYTES + at)
            whole = len(data) - len(data) % RECORD_BYTES
            if not whole:  # the file became shorter under our hands
                break
            for record in records(data[:whole]):
                if record is None:
                    damaged += 1
                else:
                    apply(record)
            at += whole
        return damaged

    def append(self, packed: Iterable[bytes]) -> None:
        """Add records. Raises `OSError`; then none of them was added."""
        data = b"".join(packed)
        if self._has_torn_tail:
            self._cut_tail()
        self._has_torn_tail = True
        try:
            _write(self._fd, data, self._end)
            if self._sync:
                os.fdatasync(self._fd)
        except BaseException:
            with contextlib.suppress(OSError):  # then the next append does it first
                self._cut_tail()
            raise
        self._has_torn_tail = False
        self._end += len(data)

    def _cut_tail(self) -> None:
        # A shorter append would leave some of it behind itself, and a replay take that for the last word about its slots.
        os.ftruncate(self._fd, self._end)
        self._has_torn_tail = False

    def is_mostly_history(self, alive: int) -> bool:
        """Whether a new file with the `alive` records would be much smaller."""
        return self.records > max(2 * alive + _SLACK, self._not_before)

    def rewrite(self, alive: Iterable[tuple[bytes, int, int]]) -> None:
        """Replace the file by one with these names, slots and checksums; after a crash it is either the old or the new one."""
        self._not_before = self.records + _SLACK
        fd, end = self._write_new(alive)
        # The name is that of the new file, so from here on nothing may be written to the old one, whatever fails.
        old, self._fd, self._end, self._has_torn_tail, self._not_before = self._fd, fd, end, False, 0
        os.close(old)
        sync_folder(self._path.parent)

    def _write_new(self, alive: Iterable[tuple[bytes, int, int]]) -> tuple[int, int]:
        """Put a new file in the place of the old one: its descriptor and its end."""
        path = self._path.with_suffix(".new")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            end, data, entries = 0, self._header.pack(), iter(alive)
            while data:
                _write(fd, data, end)
                end += len(data)
                data = b"".join(put_record(slot, name, checksum) for name, slot, checksum in islice(entries, _AT_ONCE))
            os.fsync(fd)  # a rename may reach the device before the bytes do
            path.rename(self._path)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return fd, end

    def close(self) -> None:
        """Close the file. Once."""
        os.close(self._fd)


def sync_folder(folder: Path) -> None:
    """Wait until the names in it are on the device."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:  # a write may be short, and the next one then says why
        count = os.pwrite(fd, view, offset)
        if not count:
            raise OSError(errno.EIO, f"wanted {len(view)} bytes written to the index, found none written")
        view, offset = view[count:], offset + count
