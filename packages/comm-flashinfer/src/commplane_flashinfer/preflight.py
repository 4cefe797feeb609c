"""Can the device give this memory? Asked of the driver in the way FlashInfer will, and given back before anyone builds.

A rank that runs out of memory half-way through FlashInfer's own set-up leaves its peers waiting for handles. So each rank tries
first, alone and without mapping anything, and the group builds only if all of them could.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

__all__ = ["AllocationProp", "spare"]

_PAD = 2048  # what FlashInfer adds to each allocation
_PINNED, _ON_DEVICE, _RECOMMENDED = 1, 1, 1  # CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, granularity flag
_POSIX_FD = 1
_OUT_OF_MEMORY = 2


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("gpu_direct_rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class AllocationProp(ctypes.Structure):
    """``CUmemAllocationProp`` of the driver API."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    )


def spare(ordinal: int, sizes: Sequence[int], driver: Any = None) -> str | None:
    """Why the device cannot give allocations of `sizes` bytes all at once, or None. Local; nothing stays allocated.

    Args:
        ordinal: of the device, as torch counts them.
        sizes: bytes that are asked for, before padding and rounding.
        driver: ``libcuda``, for tests.
    """
    cuda = ctypes.CDLL("libcuda.so.1") if driver is None else driver
    said = cuda.cuInit(0)
    if said:
        return f"wanted memory of GPU {ordinal}, cuInit answered error {said}: look at nvidia-smi"
    prop = AllocationProp(type=_PINNED, handle_types=_POSIX_FD, location=_Location(_ON_DEVICE, ordinal))
    prop.flags.gpu_direct_rdma = 1
    granularity = ctypes.c_size_t()
    said = cuda.cuMemGetAllocationGranularity(ctypes.byref(granularity), ctypes.byref(prop), _RECOMMENDED)
    if said:
        return f"wanted shareable memory of GPU {ordinal}, the driver answered error {said} for its granularity"
    unit = granularity.value
    rounded = [-(-(n + _PAD) // unit) * unit for n in sizes]
    handles: list[ctypes.c_ulonglong] = []
    try:
        for n in rounded:
            handle = ctypes.c_ulonglong()
            said = cuda.cuMemCreate(ctypes.byref(handle), ctypes.c_size_t(n), ctypes.byref(prop), ctypes.c_ulonglong(0))
            if said:
                why = "is out of memory" if said == _OUT_OF_MEMORY else f"answered error {said}"
                return (
                    f"wanted {sum(rounded)} bytes of shareable memory on GPU {ordinal}, it {why} after {_sum(handles, rounded)}: "
                    f"give it room, or lower max_tokens or max_bytes"
                )
            handles.append(handle)
    finally:
        for handle in handles:
            cuda.cuMemRelease(handle)
    return None


def _sum(handles: Sequence[Any], sizes: Sequence[int]) -> int:
    return sum(sizes[: len(handles)])
