"""The log file of a slab: replayed at open, appended to, written anew when most of it is history."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from commplane.errors import CommplaneError
from commplane_cache.stores.slab.record import HEADER_BYTES, RECORD_BYTES, Header, Record, put_record, records

__all__ = ["Log"]

_SLACK = 4096
"""Records of history that are never worth a new file."""


class Log:
    """Not thread-safe. An append is whole in the kernel when it returns; with `sync` also on the device."""

    def __init__(self, path: Path, header: Header, *, sync: bool, who: str) -> None:
        """Open or create.

        Raises:
            CommplaneError: the file is not a log, or of pages of another size.
        """
        self._path, self._header, self._sync = path, header, sync
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._fd, self._end = self._write_new(())
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
        _write(self._fd, data, self._end)
        if self._sync:
            os.fdatasync(self._fd)
        self._end += len(data)  # only now: what failed half way is written over by the next append

    def is_mostly_history(self, alive: int) -> bool:
        """Whether a new file with the `alive` records would be much smaller."""
        return self.records > 2 * alive + _SLACK

    def rewrite(self, alive: Iterable[tuple[bytes, int, int]]) -> None:
        """Replace the file by one with these names, slots and checksums; after a crash it is either the old or the new one."""
        fd, end = self._write_new(alive)
        os.close(self._fd)
        self._fd, self._end = fd, end

    def _write_new(self, alive: Iterable[tuple[bytes, int, int]]) -> tuple[int, int]:
        path = self._path.with_suffix(".new")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            data = self._header.pack() + b"".join(put_record(slot, name, checksum) for name, slot, checksum in alive)
            _write(fd, data, 0)
            os.fsync(fd)  # a rename may reach the device before the bytes do
            path.rename(self._path)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return fd, len(data)

    def close(self) -> None:
        """Close the file. Once."""
        os.close(self._fd)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:  # a write may be short, and the next one then says why
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
