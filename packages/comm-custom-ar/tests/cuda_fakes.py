"""Memory of GPUs that are not there, for threads as ranks: what is mapped and freed is kept account of, and misuse raises."""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from commplane.api import BuildContext, Deadline, Facts, GroupKey
from commplane_custom_ar._native import NativeError
from commplane_custom_ar.codes import ENOSPC


def context(bootstrap: Any, **options: Any) -> BuildContext:
    """Of a rank whose tensors are on the CPU, whatever its group is for."""
    key = GroupKey(tuple(bootstrap.ranks), "cuda", "tp")
    return BuildContext("custom_ar", key, bootstrap.rank, "cpu", bootstrap, Facts(()), Deadline(60.0), 60.0, options)


@dataclass
class Pool:
    """All memory of all ranks."""

    lock: Any = field(default_factory=threading.RLock)  # the collector frees in the middle of anything, also of an allocation
    numbers: Any = field(default_factory=lambda: itertools.count(1))
    live: dict[str, int] = field(default_factory=dict)  # handle -> how many processes have it open
    buffers: dict[int, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class FakeMemory:
    """As `cuda.comm.DeviceMemory`, of one rank."""

    def __init__(self, pool: Pool, *, full: bool = False, deaf: bool = False) -> None:
        self.pool, self.full, self.deaf = pool, full, deaf
        self.owned: dict[int, str] = {}
        self.opened: dict[int, str] = {}

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        if self.full:
            raise NativeError(ENOSPC, "no room")
        with self.pool.lock:
            handle = bytes([next(self.pool.numbers)]).ljust(64, b"\0")
            buffer = ctypes.create_string_buffer(nbytes)
            at = ctypes.addressof(buffer)
            self.pool.buffers[at], self.pool.live[handle.hex()] = buffer, 0
            self.owned[at] = handle.hex()
            return at, handle

    def open(self, handle: bytes) -> int:
        if self.deaf:
            raise NativeError(ENOSPC, "cannot map")
        with self.pool.lock:
            if handle.hex() not in self.pool.live:
                self.pool.wrong.append("opened what is freed")
            self.pool.live[handle.hex()] += 1
            at = (1 << 40) + 4096 * next(self.pool.numbers)
            self.opened[at] = handle.hex()
            return at

    def close(self, opened: int) -> None:
        with self.pool.lock:
            self.pool.live[self.opened.pop(opened)] -= 1

    def free(self, allocated: int) -> None:
        with self.pool.lock:
            handle = self.owned.pop(allocated)
            if self.pool.live.pop(handle):
                self.pool.wrong.append("freed what a peer maps")
            del self.pool.buffers[allocated]


class FakeComm:
    """As `cuda.comm.CudaComm`, as far as it keeps account of inputs."""

    def __init__(self) -> None:
        self.regions: dict[int, tuple[list[int], int]] = {}
        self.inputs: list[tuple[int, int]] = []
        self.rows: dict[int, list[int]] = {}
        self.log: list[str] = []

    def register(self, bases: Sequence[int], nbytes: int, number: int) -> None:
        assert number not in self.regions
        self.regions[number] = list(bases), nbytes

    def unregister(self, number: int) -> None:
        del self.regions[number]

    def captured(self) -> list[tuple[int, int]]:
        return list(self.inputs)

    def fill(self, index: int, addresses: Sequence[int]) -> None:
        self.rows[index] = list(addresses)

    def filled(self) -> None:
        self.log.append("filled")
        self.inputs.clear()
