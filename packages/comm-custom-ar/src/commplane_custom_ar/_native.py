# SPDX-License-Identifier: Apache-2.0
"""The C library ``libcommplane_car.so`` as Python: segments and communicators.

Everything here is local to the calling process but the collectives of :class:`Native`.

Pointers are integers. Nobody here keeps memory alive: a mapping ends on :meth:`Segment.close` and never earlier, not even
when the object is collected, because tensors may still point into it. Calls release the GIL.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

from commplane_custom_ar._abi import Call, Detail, FlightEntry, LayoutInfo, Options
from commplane_custom_ar._library import Hot, Native, NativeLibraryError, load
from commplane_custom_ar.codes import DTYPE_NAMES, FLIGHT_RECORDS, KIND_NAMES, MAX_WORLD, OK, OP_NAMES, STATUS

__all__ = [
    "Comm",
    "Layout",
    "Native",
    "NativeError",
    "NativeLibraryError",
    "Segment",
    "StatusDetail",
    "all_reduce",
    "barrier",
    "check",
    "isa",
    "last_error",
    "layout",
    "load",
    "set_isa",
    "single_copy_range",
]


class NativeError(OSError):
    """A native call failed. ``status`` is its code, ``name`` the code's name (``"ENOSPC"``)."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.name = STATUS.get(status, str(status))
        super().__init__(f"{message} ({self.name})")


_NATIVE: Final = load()
_library: Final = _NATIVE.library

# The two calls that tests and benchmarks make without a Native of their own.
all_reduce: Final[Hot] = _NATIVE.all_reduce
barrier: Final[Hot] = _NATIVE.barrier


def last_error() -> str:
    """The text behind the last failure in this thread."""
    text: bytes = _library.commplane_car_last_error()
    return text.decode(errors="replace")


def check(status: int) -> None:
    """Raise NativeError unless ``status`` is 0."""
    if status != OK:
        raise NativeError(status, last_error())


def isa() -> str:
    """The vector code in use in this process: baseline, avx2 or avx512."""
    name: bytes = _library.commplane_car_isa()
    return name.decode()


def set_isa(name: str) -> None:
    """Choose the vector code of this process: baseline, avx2, avx512 or auto. The results' bits do not depend on it."""
    check(_library.commplane_car_set_isa(name.encode()))


@dataclass(frozen=True)
class Layout:
    """The bytes of a group's segment, and where each rank's own part lies in it."""

    total: int
    offsets: tuple[int, ...]
    part_bytes: int


def layout(world_size: int, staging_bytes: int) -> Layout:
    """What a segment for ``world_size`` ranks with ``staging_bytes`` each needs. Pure."""
    options = Options(size=ctypes.sizeof(Options), world_size=world_size, staging_bytes=staging_bytes)
    info = LayoutInfo(size=ctypes.sizeof(LayoutInfo))
    check(_library.commplane_car_layout(ctypes.byref(options), ctypes.byref(info)))
    part = int(info.part_bytes)
    return Layout(int(info.total_bytes), tuple(rank * part for rank in range(world_size)), part)


def single_copy_range(world_size: int) -> tuple[int, int]:
    """The bytes of messages for which single copy was measured to be faster than staging; (0, 0) for none. Pure."""
    smallest, largest = ctypes.c_uint64(), ctypes.c_uint64()
    _library.commplane_car_single_copy_range(world_size, ctypes.byref(smallest), ctypes.byref(largest))
    return smallest.value, largest.value


class Segment:
    """One mapping of a POSIX shared-memory object in this process. Unmapped by close() and by nothing else."""

    def __init__(self, handle: int, base: int, nbytes: int) -> None:
        self._handle = handle
        self._base = base
        self._nbytes = nbytes

    @staticmethod
    def create(name: str, nbytes: int) -> None:
        """Make the object exclusively, zero-filled, mode 0600. No pages are allocated and nothing is mapped yet."""
        check(_library.commplane_car_segment_create(name.encode(), nbytes))

    @staticmethod
    def map(name: str, nbytes: int, reserve_offset: int = 0, reserve_bytes: int = 0) -> Segment:
        """Map all of it and allocate the pages of the given part now; a full /dev/shm is NativeError ENOSPC."""
        handle = ctypes.c_void_p()
        check(_library.commplane_car_segment_map(name.encode(), nbytes, reserve_offset, reserve_bytes, ctypes.byref(handle)))
        value = handle.value or 0
        return Segment(value, int(_library.commplane_car_segment_base(value)), nbytes)

    @staticmethod
    def unlink(name: str) -> None:
        """Remove the name; the mappings stay. A name that is not there is no error."""
        check(_library.commplane_car_segment_unlink(name.encode()))

    @property
    def handle(self) -> int:
        """The native handle, 0 once closed."""
        return self._handle

    @property
    def base(self) -> int:
        """The address of the first byte in this process, 0 once closed."""
        return self._base

    @property
    def nbytes(self) -> int:
        """The size of the object."""
        return self._nbytes

    def close(self) -> None:
        """Unmap. Idempotent. NativeError EBUSY while a Comm is open on it; tensors that point into it dangle afterwards."""
        if self._handle == 0:
            return
        check(_library.commplane_car_segment_unmap(self._handle))
        self._handle = 0
        self._base = 0


@dataclass(frozen=True)
class StatusDetail:
    """What is known about the failure that poisoned a communicator. Ranks are group ranks."""

    seq: int
    operation: str
    missing: tuple[int, ...]
    mismatched: dict[int, str]
    aborted: tuple[int, ...]
    dead: tuple[int, ...]


def _ranks(mask: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(MAX_WORLD) if mask >> rank & 1)


def _call_text(call: Call) -> str:
    """A call as people write it: ``all_reduce(sum, float32, count=100)``."""
    kind = KIND_NAMES.get(call.kind, "nothing" if call.kind == 0 else f"kind {call.kind}")
    if kind in ("nothing", "barrier"):
        return kind
    parts = [OP_NAMES.get(call.op, f"op {call.op}")] if call.op else []
    parts += [DTYPE_NAMES.get(call.dtype, f"dtype {call.dtype}"), f"count={call.count}"]
    if kind == "broadcast":
        parts.append(f"src={call.root}")
    if kind == "all_reduce_rms_norm":
        parts[0] = f"hidden={call.hidden}"
        parts += [f"eps={call.eps:g}", f"weight_bias={call.weight_bias:g}"]
    if call.symmetric:
        parts += [f"symmetric region {call.region} at {call.offset}"]
        if kind == "all_reduce":
            parts.append("in place" if call.in_place else "out of place")
    return f"{kind}({', '.join(parts)})"


class Comm:
    """One rank's end of a communicator. Opening and closing are local; one thread at a time may be in a call."""

    def __init__(
        self,
        segment: Segment,
        *,
        rank: int,
        world_size: int,
        staging_bytes: int,
        chunk_bytes: int = 0,
        oversubscribed: bool = False,
        timeout_s: float,
        token: int = 0,
    ) -> None:
        options = Options(
            size=ctypes.sizeof(Options),
            rank=rank,
            world_size=world_size,
            oversubscribed=int(oversubscribed),
            staging_bytes=staging_bytes,
            chunk_bytes=chunk_bytes,
            timeout_ns=_nanoseconds(timeout_s),
            token=token,
        )
        handle = ctypes.c_void_p()
        check(_library.commplane_car_comm_open(ctypes.byref(options), segment.handle, ctypes.byref(handle)))
        self._handle = handle.value or 0
        self._segment = segment
        self._closed = False
        self.world_size = world_size

    @property
    def handle(self) -> int:
        """What all_reduce() and barrier() take. It stays valid to pass after close(): the answer is ECLOSED."""
        return self._handle

    @property
    def chunk_bytes(self) -> int:
        """The bytes of one flag hop, after the staging's limit."""
        return int(_library.commplane_car_chunk_bytes(self._handle))

    def close(self) -> None:
        """Let go of the segment. Idempotent. NativeError EBUSY while another thread is in a call."""
        if self._closed:
            return
        check(_library.commplane_car_comm_close(self._handle))
        self._closed = True

    def abort(self) -> None:
        """Fail this communicator for all ranks: who waits or arrives later gets EABORTED. From any thread."""
        check(_library.commplane_car_abort(self._handle))

    def set_timeout(self, seconds: float) -> None:
        """The most that one wait for peers may take, for calls that begin after this. From any thread."""
        check(_library.commplane_car_set_timeout(self._handle, _nanoseconds(seconds)))

    def register_symmetric(self, base: int, stride: int, nbytes: int, number: int) -> None:
        """Say that rank r's buffers lie in [base + r*stride, +nbytes). Local; `number` is the same on every rank."""
        check(_library.commplane_car_register_symmetric(self._handle, base, stride, nbytes, number))

    def unregister_symmetric(self, number: int) -> None:
        """Take a registration back. Local; the memory may be unmapped afterwards."""
        check(_library.commplane_car_unregister_symmetric(self._handle, number))

    def enable_single_copy(self, min_bytes: int, max_bytes: int) -> None:
        """Send staged all-reduces of that many bytes without staging. Local; the same on every rank, after each has probed."""
        check(_library.commplane_car_single_copy_enable(self._handle, min_bytes, max_bytes))

    def probe_single_copy(self) -> None:
        """NativeError if this process may not read the memory of every peer. Local, after every rank has opened."""
        check(_library.commplane_car_single_copy_probe(self._handle))

    def flight(self) -> list[FlightEntry]:
        """The last calls, oldest first. Local, from any thread."""
        entries = (FlightEntry * FLIGHT_RECORDS)()
        count = ctypes.c_uint64()
        size = ctypes.sizeof(FlightEntry)
        check(_library.commplane_car_flight(self._handle, entries, size, FLIGHT_RECORDS, ctypes.byref(count)))
        return list(entries[: count.value])

    def detail(self) -> StatusDetail:
        """What is known about the failure that poisoned this communicator; of no failure, only ``seq``."""
        detail = Detail(size=ctypes.sizeof(Detail))
        check(_library.commplane_car_status_detail(self._handle, ctypes.byref(detail)))
        return StatusDetail(
            seq=int(detail.sequence),
            operation=_call_text(detail.mine),
            missing=_ranks(detail.missing_mask),
            mismatched={rank: _call_text(detail.peers[rank]) for rank in _ranks(detail.mismatch_mask)},
            aborted=_ranks(detail.abort_mask),
            dead=_ranks(detail.dead_mask),
        )


def _nanoseconds(seconds: float) -> int:
    value = int(seconds * 1e9)
    if not 0 < value < 1 << 63:
        raise ValueError(f"timeout: wanted more than 0 seconds, found {seconds}")
    return value
