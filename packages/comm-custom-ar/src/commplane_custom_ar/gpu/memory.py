# SPDX-License-Identifier: Apache-2.0
"""GPU memory that processes share, through the native library's C ABI.

Local. Every call but `check` makes a CUDA context in the calling process: `proof_child` is a process of its own for that.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

__all__ = ["HANDLE_BYTES", "GpuMemory", "GpuMemoryError"]

HANDLE_BYTES: Final = 64

_INT, _U64, _U32, _PTR, _BYTES = ctypes.c_int, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_char_p
_PROTOTYPES: Final[dict[str, list[Any]]] = {
    "check": [],
    "memory_alloc": [_INT, _U64, ctypes.POINTER(_PTR), _BYTES],
    "memory_open": [_INT, _BYTES, ctypes.POINTER(_PTR)],
    "memory_close": [_INT, _PTR],
    "memory_free": [_INT, _PTR],
    "memory_poke": [_INT, _PTR, _U64, _U32],
    "memory_peek": [_INT, _PTR, _U64, _U32, ctypes.POINTER(_U64)],
}


class GpuMemoryError(Exception):
    """The native library refused a call, or has no CUDA half; the text is a reason that can be shown."""


class GpuMemory:
    """The functions ``commplane_car_cuda_*`` on one device. Addresses are integers.

    Args:
        library: path of the native library.
        device: ordinal in this process.

    Raises:
        GpuMemoryError: the library does not load, or was built without its CUDA half.
    """

    def __init__(self, library: str, device: int) -> None:
        try:
            loaded = ctypes.CDLL(library)
            # Functions of our own: others set prototypes on those of the library object.
            self._call = {
                name: ctypes.CFUNCTYPE(_INT, *types)((f"commplane_car_cuda_{name}", loaded))
                for name, types in _PROTOTYPES.items()
            }
            self._last_error = ctypes.CFUNCTYPE(_BYTES)(("commplane_car_last_error", loaded))
        except OSError as error:
            raise GpuMemoryError(f"the native library does not load: {error}") from error
        except AttributeError as error:
            raise GpuMemoryError(
                f"the native library {library} has no CUDA half ({error}): install a commplane-custom-ar wheel that was built "
                f"with nvcc"
            ) from error
        self._device = device

    def _checked(self, name: str, *args: Any) -> None:
        status = self._call[name](*args)
        if status != 0:
            text = (self._last_error() or b"").decode(errors="replace")
            raise GpuMemoryError(f"commplane_car_cuda_{name} failed: {text or 'no text'} (status {status})")

    def check(self) -> None:
        """Return if this build has its CUDA half and the driver works. Makes no context."""
        self._checked("check")

    def allocate(self, nbytes: int) -> tuple[int, bytes]:
        """Address of new memory on the device, and the handle by which other processes open it."""
        out, handle = _PTR(), ctypes.create_string_buffer(HANDLE_BYTES)
        self._checked("memory_alloc", self._device, nbytes, ctypes.byref(out), handle)
        return out.value or 0, handle.raw

    def open(self, handle: bytes) -> int:
        """Address of another process's memory."""
        out = _PTR()
        self._checked("memory_open", self._device, handle, ctypes.byref(out))
        return out.value or 0

    def close(self, opened: int) -> None:
        """Give back what `open` gave."""
        self._checked("memory_close", self._device, opened)

    def free(self, allocated: int) -> None:
        """Give back what `allocate` gave; no other process may have it open."""
        self._checked("memory_free", self._device, allocated)

    def poke(self, at: int, words: int, value: int) -> None:
        """Store ``value + i`` in 32-bit word `i`, by a kernel; done when this returns."""
        self._checked("memory_poke", self._device, at, words, value)

    def peek(self, at: int, words: int, value: int) -> int:
        """How many words are not what `poke` stores, by a kernel."""
        wrong = _U64()
        self._checked("memory_peek", self._device, at, words, value, ctypes.byref(wrong))
        return wrong.value
