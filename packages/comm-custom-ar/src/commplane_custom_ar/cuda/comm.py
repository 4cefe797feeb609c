# SPDX-License-Identifier: Apache-2.0
"""The CUDA half of the native library as Python: a communicator, and memory that processes share.

Everything here is local. Addresses and handles of the library are integers; nobody here keeps memory alive.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

from commplane_custom_ar._abi import Call, FlightEntry
from commplane_custom_ar._library import Native
from commplane_custom_ar._native import NativeError, StatusDetail, check
from commplane_custom_ar.codes import DTYPE_NAMES, EBUSY, FLIGHT_RECORDS, KIND_NAMES
from commplane_custom_ar.cuda.abi import ALGORITHMS, HANDLE_BYTES, MAX_WORLD, Choice, Detail, Options
from commplane_custom_ar.cuda.tuned import Choice as Chosen

__all__ = ["CudaComm", "DeviceMemory", "call_text", "device_info"]

_ALL_SIZES = (1 << 64) - 1


def device_info(native: Native, device: int) -> tuple[int, int]:
    """Multiprocessors that this process may use of the device, and its compute capability as 10 * major + minor."""
    multiprocessors, capability = ctypes.c_uint32(), ctypes.c_uint32()
    check(native.library.commplane_car_cuda_device_info(device, ctypes.byref(multiprocessors), ctypes.byref(capability)))
    return multiprocessors.value, capability.value


class DeviceMemory:
    """Memory of one device of this process that other processes map."""

    def __init__(self, native: Native, device: int) -> None:
        self._library = native.library
        self._device = device

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """Address of new memory, and the handle by which other processes open it."""
        out, handle = ctypes.c_void_p(), ctypes.create_string_buffer(HANDLE_BYTES)
        check(self._library.commplane_car_cuda_memory_alloc(self._device, nbytes, ctypes.byref(out), handle))
        return out.value or 0, handle.raw

    def open(self, handle: bytes) -> int:
        """Address of another process's allocation."""
        out = ctypes.c_void_p()
        check(self._library.commplane_car_cuda_memory_open(self._device, handle, ctypes.byref(out)))
        return out.value or 0

    def close(self, opened: int) -> None:
        """Give back what `open` gave, once no kernel uses it."""
        check(self._library.commplane_car_cuda_memory_close(self._device, opened))

    def free(self, allocated: int) -> None:
        """Give back what `allocate` gave, once no other process has it open. Waits for the device."""
        check(self._library.commplane_car_cuda_memory_free(self._device, allocated))

    def handle(self, address: int) -> tuple[bytes, int]:
        """Handle of the allocation in which the address lies, and the offset in it; NativeError where it has none."""
        handle, offset = ctypes.create_string_buffer(HANDLE_BYTES), ctypes.c_uint64()
        check(self._library.commplane_car_cuda_memory_handle(self._device, address, handle, ctypes.byref(offset)))
        return handle.raw, offset.value


class CudaComm:
    """One rank's end of a communicator on CUDA.

    Args:
        native: the library.
        device: ordinal in this process.
        rank: group rank.
        world_size: number of ranks.
        multiprocessors: that its kernels may fill; equal on all ranks.
        timeout_s: the most that one wait of a kernel may take.
        control: address of the page that all ranks map; it stays until `close`.
    """

    def __init__(
        self, native: Native, *, device: int, rank: int, world_size: int, multiprocessors: int, timeout_s: float, control: int
    ) -> None:
        options = Options(
            size=ctypes.sizeof(Options),
            rank=rank,
            world_size=world_size,
            device=device,
            multiprocessors=multiprocessors,
            timeout_ns=max(1, int(timeout_s * 1e9)),
            control=control,
        )
        out, exported = ctypes.c_void_p(), ctypes.create_string_buffer(HANDLE_BYTES)
        self._library = native.library
        check(self._library.commplane_car_cuda_open(ctypes.byref(options), ctypes.byref(out), exported))
        self.handle = out.value or 0
        """What the collectives take. It stays valid to pass after `close`: the answer is ECLOSED."""
        self.exported = exported.raw
        """By which the other ranks open this rank's memory."""
        self.world_size = world_size
        self._closed = False

    def connect(self, exported: Sequence[bytes]) -> None:
        """Open the memory of all ranks, given in rank order; after all of them are open."""
        check(self._library.commplane_car_cuda_connect(self.handle, b"".join(exported)))

    def close(self) -> None:
        """Wait for the device, let go of the peers' memory, free its own. Idempotent. A call of another thread ends first."""
        if self._closed:
            return
        deadline = time.monotonic() + 5.0
        while True:
            try:
                check(self._library.commplane_car_cuda_close(self.handle))
                break
            except NativeError as error:
                if error.status != EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        self._closed = True

    def abort(self) -> None:
        """Kernels of all ranks that wait stop waiting, and every later call raises. From any thread."""
        check(self._library.commplane_car_cuda_abort(self.handle))

    def memory(self) -> tuple[int, int]:
        """Bytes that it has on the device, and the most that one kernel of one_shot_push takes."""
        nbytes, capacity = ctypes.c_uint64(), ctypes.c_uint64()
        check(self._library.commplane_car_cuda_memory(self.handle, ctypes.byref(nbytes), ctypes.byref(capacity)))
        return nbytes.value, capacity.value

    def choose(self, choices: Sequence[Chosen], *, readable: bool, capturing: bool) -> None:
        """The algorithms of all_reduce by size; the same on all ranks."""
        table = (Choice * max(1, len(choices)))()
        for entry, one in zip(table, choices, strict=False):
            entry.max_bytes = _ALL_SIZES if one.max_bytes is None else one.max_bytes
            # In a table for readable inputs, an algorithm that does not read them there means: as any other input.
            entry.algorithm = ALGORITHMS[one.algorithm]
            entry.blocks, entry.threads = one.blocks, one.threads
        check(self._library.commplane_car_cuda_choose(self.handle, int(readable), int(capturing), table, len(choices)))

    def register(self, bases: Sequence[int], nbytes: int, number: int) -> None:
        """Rank r's buffer lies at ``bases[r]`` in this process; `number` is the same on every rank."""
        check(self._library.commplane_car_cuda_register(self.handle, _addresses(bases), nbytes, number))

    def unregister(self, number: int) -> None:
        """Take a registration back; not while another thread is in a call."""
        check(self._library.commplane_car_cuda_unregister(self.handle, number))

    def capture_begin(self, *, registered: bool) -> None:
        """Calls on capturing streams are those of a graph; `registered`: their inputs are remembered."""
        check(self._library.commplane_car_cuda_capture_begin(self.handle, int(registered)))

    def capture_end(self) -> None:
        """What follows is eager again."""
        check(self._library.commplane_car_cuda_capture_end(self.handle))

    def captured(self) -> list[tuple[int, int]]:
        """Address and bytes of each input remembered since `filled`, in the order of the calls."""
        count = ctypes.c_uint32()
        check(self._library.commplane_car_cuda_captured_count(self.handle, ctypes.byref(count)))
        out = []
        for index in range(count.value):
            at, nbytes = ctypes.c_void_p(), ctypes.c_uint64()
            check(self._library.commplane_car_cuda_captured(self.handle, index, ctypes.byref(at), ctypes.byref(nbytes)))
            out.append((at.value or 0, nbytes.value))
        return out

    def fill(self, index: int, addresses: Sequence[int]) -> None:
        """Where input `index` of each rank lies in this process."""
        check(self._library.commplane_car_cuda_fill(self.handle, index, _addresses(addresses)))

    def filled(self) -> None:
        """All that was remembered is done with."""
        check(self._library.commplane_car_cuda_filled(self.handle))

    def fault(self) -> int:
        """0, or the status of a kernel that gave up. Does not wait for the device."""
        return int(self._library.commplane_car_cuda_check_faults(self.handle))

    def flight(self) -> list[FlightEntry]:
        """The last calls, oldest first: when they were queued. From any thread."""
        entries = (FlightEntry * FLIGHT_RECORDS)()
        count = ctypes.c_uint64()
        size = ctypes.sizeof(FlightEntry)
        check(self._library.commplane_car_cuda_flight(self.handle, entries, size, FLIGHT_RECORDS, ctypes.byref(count)))
        return list(entries[: count.value])

    def raw_detail(self) -> Detail:
        """The library's own words on the fault."""
        detail = Detail(size=ctypes.sizeof(Detail))
        check(self._library.commplane_car_cuda_status_detail(self.handle, ctypes.byref(detail)))
        return detail

    def detail(self) -> StatusDetail:
        """What is known about the fault. A kernel gives up after its call has returned, so ``seq`` is the call that found out."""
        detail = self.raw_detail()
        missing, aborted = _ranks(detail.missing_mask), _ranks(detail.abort_mask)
        if not set(missing) - set(aborted):  # who was missed came later, and found that the others had given up
            aborted = tuple(rank for rank in aborted if rank not in missing)
        return StatusDetail(
            seq=int(detail.sequence),
            operation=f"{call_text(detail.mine)}, noticed in call",
            missing=missing,
            mismatched={rank: call_text(detail.peers[rank]) for rank in _ranks(detail.mismatch_mask)},
            aborted=aborted,
            dead=(),
        )


def call_text(call: Call) -> str:
    """A call as people write it: ``all_reduce(float32, count=100)``. Kernels compare kind, dtype, count, root and a hash."""
    kind = KIND_NAMES.get(call.kind, "a collective" if call.kind == 0 else f"kind {call.kind}")
    if call.kind == 0 or kind == "barrier":
        return kind
    src = f", src={call.root}" if kind == "broadcast" else ""
    return f"{kind}({DTYPE_NAMES.get(call.dtype, f'dtype {call.dtype}')}, count={call.count}{src})"


def _ranks(mask: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(MAX_WORLD) if mask >> rank & 1)


def _addresses(values: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(values))(*values)
