"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import weakref
from pathlib import Path

from commplane.errors import CommplaneError

__all__ = ["FolderLock"]


class FolderLock:
    """Held from construction to `close`, or the end of the process however it comes; the kernel lets go of it.

    Raises:
        CommplaneError: another process has it; the text names its pid.
    """

    def __init__(self, folder: Path, who: str) -> None:
        self._fd: int | None = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _held.add(self)
        try:
            self._take(self._fd, folder, who)
        except BaseException:  # also of a disk without room for the pid: what is not let go of would keep this process out
            self.close()
            raise

    def _take(self, fd: int, folder: Path, who: str) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = os.pread(fd, 32, 0).decode(errors="replace").strip() or "one that is just starting"
            raise CommplaneError(
                f"{who}: wanted {folder} for process {os.getpid()} alone, found it in use by process {found}; "
                f"close that one, or give each process a folder of its own"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Let go. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        _held.discard(self)


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # A child would keep the lock when its parent has been killed: the lock belongs to the open file, which they share.
    for lock in list(_held):
        lock.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
