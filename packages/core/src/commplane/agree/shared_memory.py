"""Proof that two ranks share memory: a rank maps the segment of another and reads the token in it.

Host names, node counts and environment variables say nothing: two containers on one host may or may not share ``/dev/shm``.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
from pathlib import Path

from commplane.api.shm import SHM_DIRECTORY, owned_name

__all__ = ["ProofSegment", "maps"]

_TOKEN_BYTES = 32


class ProofSegment:
    """This rank's segment.

    Attributes:
        name: what peers open; None if this rank has no shared memory, or none to spare.
        digest: what they must find; only who maps the same memory can read the token that gives it.
    """

    def __init__(self) -> None:
        token = secrets.token_bytes(_TOKEN_BYTES)
        self.name: str | None = owned_name("proof")
        self.digest = hashlib.sha256(token).hexdigest()
        path = SHM_DIRECTORY / self.name
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:  # no shared-memory file system, or no right to use it: this rank shares memory with nobody
            self.name = None
            return
        try:
            os.posix_fallocate(fd, 0, mmap.PAGESIZE)
            with mmap.mmap(fd, mmap.PAGESIZE) as memory:
                memory[:_TOKEN_BYTES] = token
        except OSError:  # full: not even one page is to be had
            self.unlink()
        finally:
            os.close(fd)

    def unlink(self) -> None:
        """Remove the name. Idempotent."""
        if self.name is not None:
            (SHM_DIRECTORY / self.name).unlink(missing_ok=True)
            self.name = None


def maps(name: str | None, digest: str) -> bool:
    """Whether this process can map the segment `name` of another and finds the token that `digest` belongs to."""
    if name is None or Path(name).name != name:
        return False
    try:
        fd = os.open(SHM_DIRECTORY / name, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with mmap.mmap(fd, mmap.PAGESIZE) as memory:
            return hashlib.sha256(memory[:_TOKEN_BYTES]).hexdigest() == digest
    except (OSError, ValueError):
        return False
    finally:
        os.close(fd)
