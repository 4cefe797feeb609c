# SPDX-License-Identifier: Apache-2.0
"""NVML through ctypes: what the NVIDIA driver's management library knows of GPUs. No CUDA context, no dependency.

Local. NVML knows nothing of ``CUDA_VISIBLE_DEVICES``; its order is that of PCI bus ids. It sees what the container may see.
"""

from __future__ import annotations

import ctypes
from types import TracebackType
from typing import Any, Final

from commplane_custom_ar.gpu.visible import Gpu

__all__ = ["CAPS_NVLINK", "CAPS_READ", "CAPS_WRITE", "P2P_OK", "P2P_STATUS", "Nvml", "NvmlError"]

# nvmlGpuP2PCapsIndex_t of nvml.h; 3 is atomics, 4 is PCI.
CAPS_READ: Final = 0
CAPS_WRITE: Final = 1
CAPS_NVLINK: Final = 2

P2P_OK: Final = 0
# nvmlGpuP2PStatus_t of nvml.h.
P2P_STATUS: Final = {
    1: "the chipset does not support it",
    2: "the GPU does not support it",
    3: "the PCIe topology does not support it",
    4: "it is disabled by a setting of the driver",
    5: "not supported",
    6: "unknown to the driver",
}

_SUCCESS, _NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND = 0, 3, 4, 6
_INVALID_ARGUMENT, _FUNCTION_NOT_FOUND = 2, 13
_TEXT = 96  # bytes: NVML_DEVICE_UUID_V2_BUFFER_SIZE and NVML_DEVICE_NAME_V2_BUFFER_SIZE, the largest there are

_Handle = ctypes.c_void_p
_UINT = ctypes.POINTER(ctypes.c_uint)
_PROTOTYPES: Final[dict[str, list[Any]]] = {
    "nvmlInit_v2": [],
    "nvmlShutdown": [],
    "nvmlSystemGetDriverVersion": [ctypes.c_char_p, ctypes.c_uint],
    "nvmlDeviceGetCount_v2": [_UINT],
    "nvmlDeviceGetHandleByIndex_v2": [ctypes.c_uint, ctypes.POINTER(_Handle)],
    "nvmlDeviceGetHandleByUUID": [ctypes.c_char_p, ctypes.POINTER(_Handle)],
    "nvmlDeviceGetUUID": [_Handle, ctypes.c_char_p, ctypes.c_uint],
    "nvmlDeviceGetName": [_Handle, ctypes.c_char_p, ctypes.c_uint],
    "nvmlDeviceGetCudaComputeCapability": [_Handle, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)],
    "nvmlDeviceGetMigMode": [_Handle, _UINT, _UINT],
    "nvmlDeviceGetP2PStatus": [_Handle, _Handle, ctypes.c_uint, _UINT],
}


class NvmlError(Exception):
    """NVML is missing or refused a call; the text is a reason that can be shown."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


class Nvml:
    """NVML, initialised; as a context manager it is shut down at the end.

    Args:
        library: the loaded library, or what behaves like it; by default ``libnvidia-ml.so.1``.

    Raises:
        NvmlError: no such library, no driver, or no permission.
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            try:
                library = ctypes.CDLL("libnvidia-ml.so.1")
            except OSError as error:
                raise NvmlError(
                    f"libnvidia-ml.so.1 cannot be loaded ({error}): install the NVIDIA driver, or give the container the driver "
                    f"capability 'utility'"
                ) from error
        self._library = library
        self._call("nvmlInit_v2")

    def __enter__(self) -> Nvml:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._status("nvmlShutdown")  # a failure here changes nothing for anybody

    def _status(self, name: str, *args: Any) -> int:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            return _FUNCTION_NOT_FOUND
        function.argtypes = _PROTOTYPES[name]
        function.restype = ctypes.c_int
        return int(function(*args))

    def _error(self, name: str, code: int) -> NvmlError:
        if code == _FUNCTION_NOT_FOUND:
            return NvmlError(f"{name} is missing in libnvidia-ml.so.1: the NVIDIA driver is too old for it", code)
        try:
            describe = self._library.nvmlErrorString
            describe.argtypes, describe.restype = [ctypes.c_int], ctypes.c_char_p
            text = (describe(code) or b"").decode(errors="replace")
        except AttributeError:
            text = "no text"
        return NvmlError(f"{name} failed: {text} (NVML status {code})", code)

    def _call(self, name: str, *args: Any) -> None:
        code = self._status(name, *args)
        if code != _SUCCESS:
            raise self._error(name, code)

    def _text(self, name: str, *args: Any) -> str:
        buffer = ctypes.create_string_buffer(_TEXT)
        self._call(name, *args, buffer, _TEXT)
        return buffer.value.decode(errors="replace")

    def driver_version(self) -> str:
        """Of the kernel driver, such as ``580.95.05``."""
        return self._text("nvmlSystemGetDriverVersion")

    def gpus(self) -> list[Gpu]:
        """The GPUs that this process may use, by PCI bus id."""
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        out = []
        for index in range(count.value):
            handle = _Handle()
            code = self._status("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(handle))
            if code == _NO_PERMISSION:  # counted, but not given to this container: CUDA does not number it either
                continue
            if code != _SUCCESS:
                raise self._error("nvmlDeviceGetHandleByIndex_v2", code)
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            uuid, name = self._text("nvmlDeviceGetUUID", handle), self._text("nvmlDeviceGetName", handle)
            out.append(Gpu(uuid, name, (major.value, minor.value), self.mig_mode(handle)))
        return out

    def mig_mode(self, handle: Any) -> bool:
        """Whether the GPU is split into MIG instances. False where there is no such thing."""
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        code = self._status("nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
        if code in (_NOT_SUPPORTED, _INVALID_ARGUMENT, _FUNCTION_NOT_FOUND):
            return False
        if code != _SUCCESS:
            raise self._error("nvmlDeviceGetMigMode", code)
        return bool(current.value)

    def handle(self, uuid: str) -> Any:
        """The GPU or MIG instance with this full UUID, or None if it is not to be seen from here."""
        handle = _Handle()
        code = self._status("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))
        if code in (_NOT_FOUND, _NO_PERMISSION, _INVALID_ARGUMENT):
            return None
        if code != _SUCCESS:
            raise self._error("nvmlDeviceGetHandleByUUID", code)
        return handle

    def p2p_status(self, one: Any, other: Any, index: int) -> int:
        """How `one` reaches `other` in the way of `index` (`CAPS_READ` and so on): `P2P_OK` or a key of `P2P_STATUS`."""
        status = ctypes.c_uint()
        self._call("nvmlDeviceGetP2PStatus", one, other, index, ctypes.byref(status))
        return status.value
