"""The data file of a slab: pages to and from slots, straight from and into the caller's buffers, without the global lock."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

__all__ = ["DIRECT_ALIGNMENT", "SlotFile"]

DIRECT_ALIGNMENT = 4096
_MOST_BUFFERS = 1024
"""IOV_MAX of Linux."""


class SlotFile:
    """Thread-safe as far as callers do not write the same slot. Errors are `OSError`, never a signal: nothing is mapped.

    Attributes:
        refused: why O_DIRECT is not used although it was asked for, or None.
    """

    def __init__(self, path: Path, page_bytes: int, *, direct: bool) -> None:
        self._page_bytes = page_bytes
        self._path = path
        self._writers: list[int] = []
        self._local = threading.local()
        self._direct = False
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.refused = self._open_direct(path, flags | os.O_DIRECT) if direct else None
        if not self._direct:
            self._fd = os.open(path, flags, 0o600)

    def _open_direct(self, path: Path, flags: int) -> str | None:
        if self._page_bytes % DIRECT_ALIGNMENT:
            return f"pages of {self._page_bytes} bytes are no multiple of {DIRECT_ALIGNMENT}"
        fd = -1
        try:
            fd = os.open(path, flags, 0o600)
            os.preadv(fd, [mmap.mmap(-1, DIRECT_ALIGNMENT)], 0)  # some file systems refuse only here
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if error.errno != errno.EINVAL:
                raise
            return f"the file system of {path.parent} does not have O_DIRECT"
        self._fd, self._direct = fd, True
        return None

    def read(self, first: int, pages: Sequence[memoryview]) -> int:
        """Read neighbouring slots; how many pages are whole: fewer where the file ends."""
        if self._direct and not all(map(_is_aligned, pages)):
            for done, page in enumerate(pages):
                bounce = self._bounce()
                if self._move(self._fd, os.preadv, [bounce], first + done) < self._page_bytes:
                    return done
                page[:] = bounce
            return len(pages)
        return self._move(self._fd, os.preadv, pages, first) // self._page_bytes

    def write(self, first: int, pages: Sequence[memoryview]) -> None:
        """Write pages to neighbouring slots. Raises `OSError` unless all of them are whole in the kernel."""
        if self._direct and not all(map(_is_aligned, pages)):
            for done, page in enumerate(pages):
                bounce = self._bounce()
                bounce[:] = page
                self._write_all([bounce], first + done)
        else:
            self._write_all(pages, first)

    def _write_all(self, pages: Sequence[memoryview], first: int) -> None:
        wanted = len(pages) * self._page_bytes
        found = self._move(self._writer(), os.pwritev, pages, first)
        if found < wanted:
            raise OSError(errno.EIO, f"wanted {wanted} bytes written to slot {first} and on, found {found} written")

    def _bounce(self) -> memoryview:
        """A page of this thread's own, aligned."""
        if not hasattr(self._local, "bounce"):
            self._local.bounce = memoryview(mmap.mmap(-1, self._page_bytes))
        return self._local.bounce  # type: ignore[no-any-return]

    def _writer(self) -> int:
        """A descriptor of this thread's own.

        When a device fails, the kernel may drop what all threads wrote, and tells each open file once. Through one file for all,
        the first thread to sync would hear of it, and the next one be told that its pages are safe.
        """
        if not hasattr(self._local, "writer"):
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0))
            self._local.writer = fd
            self._writers.append(fd)
        return self._local.writer  # type: ignore[no-any-return]

    def _move(self, fd: int, call: Callable[[int, list[memoryview], int], int], pages: Sequence[memoryview], first: int) -> int:
        """How many bytes were moved: all, or fewer where the file ends or O_DIRECT cannot go on."""
        views, offset, moved = list(pages), first * self._page_bytes, 0
        while views:
            count = call(fd, views[:_MOST_BUFFERS], offset + moved)
            moved += count
            if not count or (self._direct and count % DIRECT_ALIGNMENT):
                break  # the end of the file
            while views and count >= len(views[0]):  # a call may move less than it was given; the next one then says why
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]
        return moved

    def reserve(self, pages: int) -> None:
        """Take room on the device for that many slots now. Raises `OSError` if there is none."""
        size = os.fstat(self._fd).st_size
        try:
            os.posix_fallocate(self._fd, 0, pages * self._page_bytes)
        except OSError:
            os.ftruncate(self._fd, size)  # else a disk that was too small would stay full
            raise

    def cut(self, pages: int) -> None:
        """Give back what lies behind that many slots."""
        if os.fstat(self._fd).st_size > pages * self._page_bytes:
            os.ftruncate(self._fd, pages * self._page_bytes)

    def sync(self) -> None:
        """Wait until what this thread wrote is on the device. Raises `OSError` if that, or what others wrote then, is not."""
        os.fdatasync(self._writer())

    def close(self) -> None:
        """Close the file. Once."""
        for fd in (*self._writers, self._fd):
            os.close(fd)


def _is_aligned(page: memoryview) -> bool:
    address: int = np.frombuffer(page, np.uint8).__array_interface__["data"][0]
    return address % DIRECT_ALIGNMENT == 0
