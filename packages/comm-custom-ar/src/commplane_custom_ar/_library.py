# SPDX-License-Identifier: Apache-2.0
"""Finding and loading ``libcommplane_car.so``, and the two ways to call it.

``abi3`` is an extension module of CPython's stable ABI for the collectives; ``ctypes`` serves everything else, and a Python that
has no such module. ``_COMMPLANE_CAR_LIBRARY`` in the environment names another library file, for tests of an uninstalled build.
With ``ctypes`` a wait for peers does not see signals: Ctrl-C then takes effect at the deadline.
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
from typing import Any, Final

import commplane_custom_ar
from commplane_custom_ar._abi import bind_prototypes
from commplane_custom_ar.codes import ABI_MAJOR
from commplane_custom_ar.cuda import abi as cuda_abi

LIBRARY_NAME: Final = "libcommplane_car.so"
FASTCALL_NAME: Final = "_fastcall.abi3.so"
HOT: Final = ("all_reduce", "barrier", "all_gather", "reduce_scatter", "broadcast", "all_reduce_rms_norm")
_CUDA_HOT: Final = tuple(f"cuda_{name}" for name in cuda_abi.HOT)

Hot = Callable[..., int]


class NativeLibraryError(ImportError):
    """The native library is missing, cannot be loaded, or has another ABI than this module was written for."""


@dataclass(frozen=True)
class Native:
    """A loaded library: its file, its ABI version, and the collectives of one binding: they return a status."""

    library: ctypes.CDLL
    path: Path
    abi: tuple[int, int]
    binding: str
    all_reduce: Hot  # (handle, in_ptr, out_ptr, count, dtype, op)
    barrier: Hot  # (handle)
    all_gather: Hot  # (handle, in_ptr, out_ptr, count, dtype)
    reduce_scatter: Hot  # (handle, in_ptr, out_ptr, count, dtype, op)
    broadcast: Hot  # (handle, ptr, count, dtype, root)
    all_reduce_rms_norm: Hot  # (handle, in, residual, weight, norm_out, residual_out, rows, hidden, dtype, eps, weight_bias)
    # The same on CUDA: an op there is none, and the last number is the stream.
    cuda_all_reduce: Hot
    cuda_barrier: Hot
    cuda_all_gather: Hot
    cuda_reduce_scatter: Hot
    cuda_broadcast: Hot
    cuda_all_reduce_rms_norm: Hot
    tensor_all_reduce: Callable[..., Any] | None = None
    """(torch, handle, dtype, op, in_place, fallback, fail) -> an all-reduce of one tensor in one C call, or None (abi3 only)."""
    cuda_tensor_all_reduce: Callable[..., Any] | None = None
    """(torch, handle, dtype, device, in_place, fallback, fail) -> the same on CUDA, on the current stream of that device."""


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
    try:
        bind_prototypes(loaded)
        cuda_abi.bind_prototypes(loaded)
    except AttributeError as error:
        raise NativeLibraryError(
            f"{path} is older than this module ({error}); reinstall commplane-custom-ar so that its Python and native halves are "
            "of one version"
        ) from error

    wanted = binding or "auto"
    if wanted not in ("auto", "abi3", "ctypes"):
        raise NativeLibraryError(f"native binding: wanted auto, abi3 or ctypes, found {wanted!r}")
    if wanted != "ctypes":
        module = _load_fastcall(path)
        if module is not None:
            names = [*HOT, *_CUDA_HOT, "set_interrupt_check"]
            module.bind(*(ctypes.cast(getattr(loaded, f"commplane_car_{f}"), ctypes.c_void_p).value for f in names))
            more = ("tensor_all_reduce", "cuda_tensor_all_reduce")
            return Native(loaded, path, abi, "abi3", **{name: getattr(module, name) for name in (*HOT, *_CUDA_HOT, *more)})
        if wanted == "abi3":
            raise NativeLibraryError(
                f"native binding abi3: no usable {FASTCALL_NAME} beside {path}; use ctypes or rebuild the wheel"
            )
    return Native(loaded, path, abi, "ctypes", **{name: getattr(loaded, f"commplane_car_{name}") for name in (*HOT, *_CUDA_HOT)})
