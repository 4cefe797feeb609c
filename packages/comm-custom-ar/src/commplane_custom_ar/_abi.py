# SPDX-License-Identifier: Apache-2.0
"""The structs and prototypes of the C ABI for ctypes. Pure."""

from __future__ import annotations

import ctypes

from commplane_custom_ar.codes import MAX_WORLD


class Options(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("rank", ctypes.c_uint32),
        ("world_size", ctypes.c_uint32),
        ("oversubscribed", ctypes.c_uint32),
        ("staging_bytes", ctypes.c_uint64),
        ("chunk_bytes", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_uint64),
        ("token", ctypes.c_uint64),
    ]


class LayoutInfo(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("total_bytes", ctypes.c_uint64),
        ("part_offset", ctypes.c_uint64),
        ("part_bytes", ctypes.c_uint64),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
        ("op", ctypes.c_uint32),
        ("symmetric", ctypes.c_uint32),
        ("in_place", ctypes.c_uint32),
        ("region", ctypes.c_uint32),
        ("count", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("hidden", ctypes.c_uint64),
        ("root", ctypes.c_uint32),
        ("eps", ctypes.c_float),
        ("weight_bias", ctypes.c_float),
        ("reserved", ctypes.c_uint32),
    ]


class Detail(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("status", ctypes.c_int32),
        ("sequence", ctypes.c_uint64),
        ("missing_mask", ctypes.c_uint64),
        ("mismatch_mask", ctypes.c_uint64),
        ("abort_mask", ctypes.c_uint64),
        ("dead_mask", ctypes.c_uint64),
        ("mine", Call),
        ("peers", Call * MAX_WORLD),
    ]


class FlightEntry(ctypes.Structure):
    _fields_ = [
        ("sequence", ctypes.c_uint64),
        ("status", ctypes.c_int32),
        ("steps", ctypes.c_uint32),
        ("begun_ns", ctypes.c_uint64),
        ("ended_ns", ctypes.c_uint64),
        ("waiting_mask", ctypes.c_uint64),
        ("call", Call),
    ]


def bind_prototypes(library: ctypes.CDLL) -> None:
    pointer, u32, u64, text, code = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int
    prototypes: dict[str, tuple[object, list[object]]] = {
        "last_error": (text, []),
        "isa": (text, []),
        "set_isa": (code, [text]),
        "segment_create": (code, [text, u64]),
        "segment_map": (code, [text, u64, u64, u64, ctypes.POINTER(pointer)]),
        "segment_base": (pointer, [pointer]),
        "segment_unmap": (code, [pointer]),
        "segment_unlink": (code, [text]),
        "layout": (code, [ctypes.POINTER(Options), ctypes.POINTER(LayoutInfo)]),
        "comm_open": (code, [ctypes.POINTER(Options), pointer, ctypes.POINTER(pointer)]),
        "comm_close": (code, [pointer]),
        "set_timeout": (code, [pointer, u64]),
        "chunk_bytes": (u64, [pointer]),
        "register_symmetric": (code, [pointer, pointer, u64, u64, u32]),
        "unregister_symmetric": (code, [pointer, u32]),
        "all_reduce": (code, [pointer, pointer, pointer, u64, code, code]),
        "barrier": (code, [pointer]),
        "all_gather": (code, [pointer, pointer, pointer, u64, code]),
        "reduce_scatter": (code, [pointer, pointer, pointer, u64, code, code]),
        "broadcast": (code, [pointer, pointer, u64, code, u32]),
        "all_reduce_rms_norm": (code, [*[pointer] * 6, u64, u64, code, ctypes.c_float, ctypes.c_float]),
        "single_copy_probe": (code, [pointer]),
        "single_copy_range": (None, [u32, ctypes.POINTER(u64), ctypes.POINTER(u64)]),
        "single_copy_enable": (code, [pointer, u64, u64]),
        "flight": (code, [pointer, pointer, u64, u64, ctypes.POINTER(u64)]),
        "set_interrupt_check": (None, [pointer]),
        "abort": (code, [pointer]),
        "status_detail": (code, [pointer, ctypes.POINTER(Detail)]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, f"commplane_car_{name}")
        function.restype = result
        function.argtypes = arguments
