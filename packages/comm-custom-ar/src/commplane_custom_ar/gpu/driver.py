# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver through ctypes: which GPU a device ordinal is. Makes no CUDA context.

Local. Asking initialises the driver (``cuInit``), after which processes forked from this one cannot use CUDA; so does everything
else that asks CUDA for its devices. The driver reads ``CUDA_VISIBLE_DEVICES`` then, and never again.
"""

from __future__ import annotations

import ctypes
import uuid
from typing import Any, Final

__all__ = ["Driver", "DriverError"]

# CUdevice_attribute of cuda.h.
_MAJOR, _MINOR, _MPS_ENABLED = 75, 76, 133
_NO_DEVICE: Final = 100

_INT = ctypes.POINTER(ctypes.c_int)
_PROTOTYPES: Final[dict[str, list[Any]]] = {
    "cuInit": [ctypes.c_uint],
    "cuDriverGetVersion": [_INT],
    "cuDeviceGetCount": [_INT],
    "cuDeviceGet": [_INT, ctypes.c_int],
    "cuDeviceGetAttribute": [_INT, ctypes.c_int, ctypes.c_int],
    "cuDeviceGetName": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    "cuDeviceGetPCIBusId": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    "cuDeviceGetUuid": [ctypes.c_char_p, ctypes.c_int],
    "cuDeviceGetUuid_v2": [ctypes.c_char_p, ctypes.c_int],
}


class DriverError(Exception):
    """The CUDA driver is missing or refused a call; the text is a reason that can be shown."""


class Driver:
    """The CUDA driver, initialised.

    Args:
        library: the loaded library, or what behaves like it; by default ``libcuda.so.1``.

    Raises:
        DriverError: no such library, or it does not start.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL("libcuda.so.1")
            except OSError as error:
                raise DriverError(
                    f"libcuda.so.1 cannot be loaded ({error}): install the NVIDIA driver, or give the container its GPUs"
                ) from error
        self._library = library
        code = self._status("cuInit", 0)
        # Without a device the driver refuses to start; that is a number, and who asks knows the reason better.
        self._devices = 0
        if code not in (0, _NO_DEVICE):
            raise self._error("cuInit", code)
        if code == 0:
            count = ctypes.c_int()
            self._call("cuDeviceGetCount", ctypes.byref(count))
            self._devices = count.value

    def _status(self, name: str, *args: Any) -> int:
        function = getattr(self._library, name)
        function.argtypes = _PROTOTYPES[name]
        function.restype = ctypes.c_int
        return int(function(*args))

    def _error(self, name: str, code: int) -> DriverError:
        text = ctypes.c_char_p()
        describe = self._library.cuGetErrorString
        describe.argtypes, describe.restype = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)], ctypes.c_int
        describe(code, ctypes.byref(text))
        words = (text.value or b"no text").decode(errors="replace")
        return DriverError(f"{name} of the CUDA driver failed: {words} (CUDA error {code})")

    def _call(self, name: str, *args: Any) -> None:
        code = self._status(name, *args)
        if code != 0:
            raise self._error(name, code)

    def _device(self, ordinal: int) -> int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device.value

    def _attribute(self, ordinal: int, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device(ordinal))
        return value.value

    def _text(self, name: str, ordinal: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        self._call(name, buffer, 256, self._device(ordinal))
        return buffer.value.decode(errors="replace")

    @property
    def count(self) -> int:
        """Number of devices that this process sees."""
        return self._devices

    def version(self) -> str:
        """The newest CUDA that the driver serves, such as ``13.0``."""
        value = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(value))
        return f"{value.value // 1000}.{value.value % 1000 // 10}"

    def name(self, ordinal: int) -> str:
        """Product name."""
        return self._text("cuDeviceGetName", ordinal)

    def pci_bus_id(self, ordinal: int) -> str:
        """Such as ``0000:65:00.0``."""
        return self._text("cuDeviceGetPCIBusId", ordinal)

    def capability(self, ordinal: int) -> tuple[int, int]:
        """Compute capability."""
        return self._attribute(ordinal, _MAJOR), self._attribute(ordinal, _MINOR)

    def uuid(self, ordinal: int) -> tuple[str, bool]:
        """UUID without prefix, and whether it is known to be that of a MIG instance."""
        device, own, gpu = self._device(ordinal), ctypes.create_string_buffer(16), ctypes.create_string_buffer(16)
        # The second version gives the UUID of a MIG instance, the first that of the GPU which it is a part of. A driver has
        # at least one of them.
        names = [name for name in ("cuDeviceGetUuid_v2", "cuDeviceGetUuid") if hasattr(self._library, name)]
        self._call(names[0], own, device)
        self._call(names[-1], gpu, device)
        return str(uuid.UUID(bytes=own.raw)), own.raw != gpu.raw

    def mps(self, ordinal: int) -> bool | None:
        """Whether processes run on this device side by side, through MPS; None where the driver is too old to say."""
        try:
            return bool(self._attribute(ordinal, _MPS_ENABLED))
        except DriverError:
            return None
