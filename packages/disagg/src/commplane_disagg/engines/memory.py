"""Memory that another process of this host can map: sealed anonymous files, which no name outlives."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from commplane.errors import CommplaneError
from commplane_disagg.engines.base import address_of

__all__ = ["Mapping", "SharedPool", "host_identity", "map_peer"]


@dataclass
class SharedPool:
    """An anonymous file of this process, mapped. Nobody can make it smaller, so no access to it can fault.

    Attributes:
        fd: of the file.
        view: of the mapping.
    """

    fd: int
    view: memoryview

    @classmethod
    def create(cls, nbytes: int) -> SharedPool:
        """Zeroed memory. Local.

        Raises:
            CommplaneError: the kernel has not got it.
        """
        try:
            fd = os.memfd_create("commplane-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise CommplaneError(f"shared memory of {nbytes} bytes cannot be made: {error}") from error
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, memoryview(mmap.mmap(fd, nbytes, mmap.MAP_SHARED)))
        except (OSError, ValueError) as error:
            os.close(fd)
            raise CommplaneError(f"shared memory of {nbytes} bytes cannot be mapped: {error}") from error

    def offset_of(self, pool: memoryview) -> int | None:
        """Where in this file `pool` begins, or None if it does not lie in it."""
        offset = address_of(pool) - address_of(self.view)
        return offset if offset >= 0 and offset + pool.nbytes <= self.view.nbytes else None

    def close(self) -> None:
        """Give the file back. The mapping goes with the last view of it, which may be the caller's."""
        os.close(self.fd)


@dataclass
class Mapping:
    """A peer's pool in this process."""

    memory: mmap.mmap
    address: int
    nbytes: int


def map_peer(fd: int, offset: int, nbytes: int, peer: str) -> Mapping:
    """Map what a peer handed over; `fd` stays the caller's. The mapping goes with the last reference to it.

    Raises:
        CommplaneError: it is smaller than the peer said, or could become so, which would kill who writes to it.
    """
    try:
        size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise CommplaneError(f"pool of peer {peer!r}: wanted an anonymous file, found something else: {error}") from error
    if not seals & fcntl.F_SEAL_SHRINK or offset < 0 or nbytes <= 0 or offset + nbytes > size:
        raise CommplaneError(
            f"pool of peer {peer!r}: wanted a sealed file with {nbytes} bytes at {offset}, found {size} bytes, seals {seals:#x}"
        )
    try:
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED)
    except (OSError, ValueError) as error:
        raise CommplaneError(f"pool of peer {peer!r}, {size} bytes, cannot be mapped: {error}") from error
    return Mapping(memory, address_of(memoryview(memory)) + offset, nbytes)


def host_identity() -> str:
    """Equal for processes that can reach each other's abstract sockets: one running kernel, one network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/net').readlink()}"
