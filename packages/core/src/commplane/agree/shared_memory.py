"""Proof that two ranks share memory: a rank maps the segment of another and reads the token in it.

Host names, node counts and environment variables say nothing: two containers on one host may or may not share ``/dev/shm``.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["SHM_PREFIX", "ProofSegment", "sweep"]

SHM_DIRECTORY = Path("/dev/shm")
SHM_PREFIX = "commplane-"
_TOKEN_BYTES = 32
# Names live for one exchange, so one of this age was left by a job that was killed in the middle of it.
_STALE_AFTER_S = 3600.0


def _path(nonce: str, rank: int) -> Path:
    return SHM_DIRECTORY / f"{SHM_PREFIX}proof-{nonce}-{rank}"


class ProofSegment:
    """This rank's segment. `digest` is published; only who maps the same memory can find the token that gives it."""

    def __init__(self, nonce: str, rank: int) -> None:
        self._nonce = nonce
        self._rank = rank
        token = secrets.token_bytes(_TOKEN_BYTES)
        self.digest: str | None = None
        try:
            fd = os.open(_path(nonce, rank), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # no shared-memory file system, or no right to use it: this rank shares memory with nobody
            return
        try:
            os.posix_fallocate(fd, 0, mmap.PAGESIZE)
            with mmap.mmap(fd, mmap.PAGESIZE) as memory:
                memory[:_TOKEN_BYTES] = token
            self.digest = hashlib.sha256(token).hexdigest()
        except OSError:  # full: not even one page is to be had
            self.unlink([rank])
        finally:
            os.close(fd)

    def maps(self, rank: int, digest: str | None) -> bool:
        """Whether this process can map the segment of `rank` and finds the token that `digest` belongs to."""
        if digest is None:
            return False
        try:
            fd = os.open(_path(self._nonce, rank), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            with mmap.mmap(fd, mmap.PAGESIZE) as memory:
                return hashlib.sha256(memory[:_TOKEN_BYTES]).hexdigest() == digest
        except (OSError, ValueError):
            return False
        finally:
            os.close(fd)

    def unlink(self, ranks: Iterable[int]) -> None:
        """Remove the names of `ranks`: its own after the exchange, everyone's when the exchange failed."""
        for rank in ranks:
            _path(self._nonce, rank).unlink(missing_ok=True)


def sweep() -> None:
    """Remove names of ours that a killed job left. Local; only this user's, and only old ones."""
    if not SHM_DIRECTORY.is_dir():
        return
    for path in SHM_DIRECTORY.glob(f"{SHM_PREFIX}*"):
        try:
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _STALE_AFTER_S:
                path.unlink()
        except OSError:  # gone already, or not ours to remove
            continue
