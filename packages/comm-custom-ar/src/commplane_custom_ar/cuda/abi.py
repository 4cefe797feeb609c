# SPDX-License-Identifier: Apache-2.0
"""The structs, prototypes and numbers of ``csrc/include/commplane_car_cuda.h`` for ctypes. Pure."""

from __future__ import annotations

import ctypes
from typing import Final

from commplane_custom_ar._abi import Call

__all__ = ["ALGORITHMS", "CONTROL_BYTES", "HANDLE_BYTES", "HOT", "MAX_CHOICES", "MAX_WORLD", "bind_prototypes"]

MAX_WORLD: Final = 8
HANDLE_BYTES: Final = 64
CONTROL_BYTES: Final = 4096
MAX_CHOICES: Final = 32
ALGORITHMS: Final[dict[str, int]] = {
    "one_shot_push": 1,
    "two_shot_push": 2,
    "one_shot_pull": 3,
    "two_shot_pull": 4,
}
HOT: Final = ("all_reduce", "barrier", "all_gather", "reduce_scatter", "broadcast", "all_reduce_rms_norm")
"""The collectives, in the order in which the extension module takes their addresses."""


class Choice(ctypes.Structure):
    _fields_ = [
        ("max_bytes", ctypes.c_uint64),
        ("algorithm", ctypes.c_uint32),
        ("blocks", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    ]


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("rank", ctypes.c_uint32),
        ("world_size", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("multiprocessors", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("timeout_ns", ctypes.c_uint64),
        ("control", ctypes.c_void_p),
    ]


class Detail(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("status", ctypes.c_int32),
        ("sequence", ctypes.c_uint64),
        ("missing_mask", ctypes.c_uint64),
        ("mismatch_mask", ctypes.c_uint64),
        ("abort_mask", ctypes.c_uint64),
        ("mine", Call),
        ("peers", Call * MAX_WORLD),
    ]


def bind_prototypes(library: ctypes.CDLL) -> None:
    """Say what the functions of `library` take. AttributeError where it is older than the header."""
    pointer, u32, u64, text, code = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int
    to, addresses, single = ctypes.POINTER, ctypes.POINTER(ctypes.c_void_p), ctypes.c_float
    prototypes: dict[str, list[object]] = {
        "check": [],
        "device_info": [code, to(u32), to(u32)],
        "memory_alloc": [code, u64, to(pointer), text],
        "memory_open": [code, text, to(pointer)],
        "memory_close": [code, pointer],
        "memory_free": [code, pointer],
        "memory_handle": [code, pointer, text, to(u64)],
        "open": [to(Options), to(pointer), text],
        "connect": [pointer, text],
        "close": [pointer],
        "abort": [pointer],
        "set_timeout": [pointer, u64],
        "memory": [pointer, to(u64), to(u64)],
        "choose": [pointer, code, code, to(Choice), u32],
        "register": [pointer, addresses, u64, u32],
        "unregister": [pointer, u32],
        "capture_begin": [pointer, code],
        "capture_end": [pointer],
        "captured": [pointer, u32, to(pointer), to(u64)],
        "captured_count": [pointer, to(u32)],
        "fill": [pointer, u32, addresses],
        "filled": [pointer],
        "all_reduce": [pointer, pointer, pointer, u64, code, u64],
        "all_reduce_rms_norm": [*[pointer] * 6, u64, u64, code, single, single, u64],
        "all_gather": [pointer, pointer, pointer, u64, code, u64],
        "reduce_scatter": [pointer, pointer, pointer, u64, code, u64],
        "broadcast": [pointer, pointer, u64, code, u32, u64],
        "barrier": [pointer, u64],
        "check_faults": [pointer],
        "status_detail": [pointer, to(Detail)],
        "flight": [pointer, pointer, u64, u64, to(u64)],
    }
    for name, arguments in prototypes.items():
        function = getattr(library, f"commplane_car_cuda_{name}")
        function.restype = code
        function.argtypes = arguments
