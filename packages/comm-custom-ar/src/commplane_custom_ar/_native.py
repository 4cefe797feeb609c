# SPDX-License-Identifier: Apache-2.0
"""The C library ``libcommplane_car.so`` as Python: segments, communicators, and the two calls of the hot path.

Everything here is local to the calling process but :func:`all_reduce` and :func:`barrier`, which are collective. There are
two bindings with the same functions: ``abi3``, an extension module of CPython's stable ABI, for the two hot calls, and
``ctypes``, for everything else and for a Python that has no such module. :func:`load` can force one.
``_COMMPLANE_CAR_LIBRARY`` in the environment names another library file, for tests of an uninstalled build.

Pointers are integers. Nobody here keeps memory alive: a mapping ends on :meth:`Segment.close` and never earlier, not even
when the object is collected, because tensors may still point into it. Calls release the GIL.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

import commplane_custom_ar

ABI_MAJOR: Final = 1
LIBRARY_NAME: Final = "libcommplane_car.so"
FASTCALL_NAME: Final = "_fastcall.abi3.so"
MAX_WORLD: Final = 64
RING_SLOTS: Final = 4  # chunks of one rank that may be under way at once; kRing of comm.h

DTYPES: Final[dict[str, int]] = {"float32": 1, "float16": 2, "bfloat16": 3}
OPS: Final[dict[str, int]] = {"sum": 1, "min": 2, "max": 3, "avg": 4}
STATUS: Final[dict[int, str]] = {
    0: "OK",
    -1: "EINVAL",
    -2: "ENOMEM",
    -3: "ESYS",
    -4: "ENOSPC",
    -5: "EEXIST",
    -6: "ENOENT",
    -7: "ESIZE",
    -8: "EPERM",
    -9: "ETIMEDOUT",
    -10: "EABORTED",
    -11: "EMISMATCH",
    -12: "EPOISONED",
    -13: "ECLOSED",
    -14: "EBUSY",
    -15: "EUNSUPPORTED",
    -16: "ELIMIT",
}
OK: Final = 0
EINVAL: Final = -1
ENOSPC: Final = -4
ETIMEDOUT: Final = -9
EABORTED: Final = -10
EMISMATCH: Final = -11
EPOISONED: Final = -12
ECLOSED: Final = -13
EBUSY: Final = -14

_DTYPE_NAMES: Final = {code: name for name, code in DTYPES.items()}
_OP_NAMES: Final = {code: name for name, code in OPS.items()}
_KIND_NAMES: Final = {0: "none", 1: "all_reduce", 2: "barrier"}

AllReduceFunction = Callable[[int, int, int, int, int, int], int]
BarrierFunction = Callable[[int], int]


class NativeLibraryError(ImportError):
    """The native library is missing, cannot be loaded, or has another ABI than this module was written for."""


class NativeError(OSError):
    """A native call failed. ``status`` is its code, ``name`` the code's name (``"ENOSPC"``)."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.name = STATUS.get(status, str(status))
        super().__init__(f"{message} ({self.name})")


class _Options(ctypes.Structure):
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


class _LayoutInfo(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("total_bytes", ctypes.c_uint64),
        ("part_offset", ctypes.c_uint64),
        ("part_bytes", ctypes.c_uint64),
    ]


class _Call(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint32),
        ("dtype", ctypes.c_uint32),
        ("op", ctypes.c_uint32),
        ("symmetric", ctypes.c_uint32),
        ("in_place", ctypes.c_uint32),
        ("region", ctypes.c_uint32),
        ("count", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
    ]


class _Detail(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_uint32),
        ("status", ctypes.c_int32),
        ("sequence", ctypes.c_uint64),
        ("missing_mask", ctypes.c_uint64),
        ("mismatch_mask", ctypes.c_uint64),
        ("abort_mask", ctypes.c_uint64),
        ("mine", _Call),
        ("peers", _Call * MAX_WORLD),
    ]


def _bind_prototypes(library: ctypes.CDLL) -> None:
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
        "layout": (code, [ctypes.POINTER(_Options), ctypes.POINTER(_LayoutInfo)]),
        "comm_open": (code, [ctypes.POINTER(_Options), pointer, ctypes.POINTER(pointer)]),
        "comm_close": (code, [pointer]),
        "set_timeout": (code, [pointer, u64]),
        "chunk_bytes": (u64, [pointer]),
        "register_symmetric": (code, [pointer, pointer, u64, u64, u32]),
        "unregister_symmetric": (code, [pointer, u32]),
        "all_reduce": (code, [pointer, pointer, pointer, u64, code, code]),
        "barrier": (code, [pointer]),
        "abort": (code, [pointer]),
        "status_detail": (code, [pointer, ctypes.POINTER(_Detail)]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, f"commplane_car_{name}")
        function.restype = result
        function.argtypes = arguments


@dataclass(frozen=True)
class Native:
    """A loaded library: its file, its ABI version, and the hot calls of one binding."""

    library: ctypes.CDLL
    path: Path
    abi: tuple[int, int]
    binding: str
    all_reduce: AllReduceFunction
    barrier: BarrierFunction


def _find(file_name: str) -> Path | None:
    """The file next to this package. An editable install has two folders: the sources' and the built files'."""
    for folder in commplane_custom_ar.__path__:
        path = Path(folder) / file_name
        if path.is_file():
            return path
    return None


def _find_library() -> Path:
    override = os.environ.get("_COMMPLANE_CAR_LIBRARY")
    if override:
        return Path(override)
    path = _find(LIBRARY_NAME)
    if path is None:
        folders = ", ".join(str(folder) for folder in commplane_custom_ar.__path__)
        raise NativeLibraryError(
            f"{LIBRARY_NAME} is missing: wanted in {folders}; install the commplane-custom-ar wheel or build it with pip"
        )
    return path


def _load_fastcall(library_path: Path) -> ModuleType | None:
    """The extension module beside the library, or None if this build or this Python has none."""
    path = library_path.with_name(FASTCALL_NAME)
    # Only a CPython with a GIL has the stable ABI; a free-threaded one would crash on it rather than refuse.
    if ".abi3.so" not in importlib.machinery.EXTENSION_SUFFIXES or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return None
    if not path.is_file():
        return None
    name = f"{__package__}._fastcall"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader, origin=str(path))
    if spec is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError:
        return None
    return module


def load(binding: str | None = None, library: str | os.PathLike[str] | None = None) -> Native:
    """Load the native library, check its ABI and bind the hot calls. Local.

    ``binding`` is ``"abi3"``, ``"ctypes"``, or ``"auto"`` or None for the best there is. Raises
    NativeLibraryError, an ImportError.
    """
    path = Path(library) if library is not None else _find_library()
    try:
        loaded = ctypes.CDLL(str(path))
        version = loaded.commplane_car_abi_version
    except (OSError, AttributeError) as error:
        raise NativeLibraryError(f"cannot load {path}: {error}") from error
    version.restype = ctypes.c_uint32
    version.argtypes = []
    packed = int(version())
    abi = (packed >> 16, packed & 0xFFFF)
    if abi[0] != ABI_MAJOR:
        raise NativeLibraryError(
            f"native ABI of {path}: wanted {ABI_MAJOR}.x, found {abi[0]}.{abi[1]}; "
            "reinstall commplane-custom-ar so that its Python and native halves are of one version"
        )
    _bind_prototypes(loaded)

    wanted = binding or "auto"
    if wanted not in ("auto", "abi3", "ctypes"):
        raise NativeLibraryError(f"native binding: wanted auto, abi3 or ctypes, found {wanted!r}")
    if wanted != "ctypes":
        module = _load_fastcall(path)
        if module is not None:
            addresses = [
                ctypes.cast(getattr(loaded, f"commplane_car_{f}"), ctypes.c_void_p).value for f in ("all_reduce", "barrier")
            ]
            module.bind(*addresses)
            return Native(loaded, path, abi, "abi3", module.all_reduce, module.barrier)
        if wanted == "abi3":
            raise NativeLibraryError(
                f"native binding abi3: no usable {FASTCALL_NAME} beside {path}; use ctypes or rebuild the wheel"
            )
    return Native(loaded, path, abi, "ctypes", loaded.commplane_car_all_reduce, loaded.commplane_car_barrier)


_NATIVE: Final = load()
_library: Final = _NATIVE.library

# The hot path: all_reduce(handle, in_ptr, out_ptr, count, dtype, op) and barrier(handle), collective, return the status.
all_reduce: Final[AllReduceFunction] = _NATIVE.all_reduce
barrier: Final[BarrierFunction] = _NATIVE.barrier


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
    options = _Options(size=ctypes.sizeof(_Options), world_size=world_size, staging_bytes=staging_bytes)
    info = _LayoutInfo(size=ctypes.sizeof(_LayoutInfo))
    check(_library.commplane_car_layout(ctypes.byref(options), ctypes.byref(info)))
    part = int(info.part_bytes)
    return Layout(int(info.total_bytes), tuple(rank * part for rank in range(world_size)), part)


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


def _ranks(mask: int) -> tuple[int, ...]:
    return tuple(rank for rank in range(MAX_WORLD) if mask >> rank & 1)


def _call_text(call: _Call) -> str:
    kind = _KIND_NAMES.get(call.kind, f"kind {call.kind}")
    if kind != "all_reduce":
        return kind
    text = f"all_reduce({_OP_NAMES.get(call.op, call.op)}, {_DTYPE_NAMES.get(call.dtype, call.dtype)}, count={call.count}"
    if call.symmetric:
        place = "in place" if call.in_place else "out of place"
        text += f", symmetric region {call.region} at {call.offset}, {place}"
    return text + ")"


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
        options = _Options(
            size=ctypes.sizeof(_Options),
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

    def detail(self) -> StatusDetail:
        """What is known about the failure that poisoned this communicator; of no failure, only ``seq``."""
        detail = _Detail(size=ctypes.sizeof(_Detail))
        check(_library.commplane_car_status_detail(self._handle, ctypes.byref(detail)))
        return StatusDetail(
            seq=int(detail.sequence),
            operation=_call_text(detail.mine),
            missing=_ranks(detail.missing_mask),
            mismatched={rank: _call_text(detail.peers[rank]) for rank in _ranks(detail.mismatch_mask)},
            aborted=_ranks(detail.abort_mask),
        )


def _nanoseconds(seconds: float) -> int:
    value = int(seconds * 1e9)
    if not 0 < value < 1 << 63:
        raise ValueError(f"timeout: wanted more than 0 seconds, found {seconds}")
    return value
