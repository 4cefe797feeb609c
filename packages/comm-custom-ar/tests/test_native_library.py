# SPDX-License-Identifier: Apache-2.0
"""The native library as a file: found, loaded, bound, its ABI and its names. One process, no torch."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from commplane_custom_ar import _library, _native, codes


@pytest.fixture(params=("ctypes", "abi3"))
def binding(request: pytest.FixtureRequest) -> str:
    if request.param == "abi3":
        try:
            _native.load("abi3")
        except _native.NativeLibraryError as error:
            pytest.skip(f"this build has no abi3 binding: {error}")
    return str(request.param)


def test_wrong_arguments_raise_and_do_not_call(binding: str) -> None:
    native = _native.load(binding)
    for arguments in ((), (1, 2, 3), (0.5, 0, 0, 0, 1, 1), (0, 0, 0, 0, None, 1)):
        with pytest.raises((TypeError, ctypes.ArgumentError)):
            native.all_reduce(*arguments)
    for call in (native.barrier, native.all_gather, native.reduce_scatter, native.broadcast, native.all_reduce_rms_norm):
        with pytest.raises((TypeError, ctypes.ArgumentError)):
            call()


def test_a_handle_that_is_none_and_a_dtype_or_op_that_is_none_are_status_codes(binding: str) -> None:
    native = _native.load(binding)
    assert native.barrier(0) == codes.EINVAL
    assert native.all_gather(0, 0, 0, 0, 1) == codes.EINVAL
    assert native.reduce_scatter(0, 0, 0, 0, 1, 1) == codes.EINVAL
    assert native.broadcast(0, 0, 0, 1, 0) == codes.EINVAL
    assert native.all_reduce_rms_norm(0, 0, 0, 0, 0, 0, 0, 0, 1, 1e-6, 0.0) == codes.EINVAL


def test_the_numbers_of_python_are_those_of_the_header() -> None:
    header = Path(__file__).parent.parent / "csrc/include/commplane_car.h"
    text = header.read_text()
    found = dict(re.findall(r"COMMPLANE_CAR_(\w+) = (-?\d+)", text))
    for name, code in {**codes.DTYPES, **codes.OPS}.items():
        assert found.pop(name.upper()) == str(code)
    for name, code in codes.KINDS.items():
        assert found.pop(f"KIND_{name.upper()}") == str(code)
    assert found.pop("KIND_NONE") == "0"
    assert found == {name: str(code) for code, name in codes.STATUS.items()}
    defined = dict(re.findall(r"#define COMMPLANE_CAR_(\w+) (\d+)", text))
    assert (defined["ABI_MAJOR"], defined["MAX_WORLD"]) == (str(codes.ABI_MAJOR), str(codes.MAX_WORLD))
    assert defined["FLIGHT_RECORDS"] == str(codes.FLIGHT_RECORDS)


def test_full_shared_memory_is_an_error_code() -> None:
    about = os.statvfs("/dev/shm")
    if about.f_blocks == 0:
        pytest.skip("/dev/shm has no limit")
    nbytes = about.f_blocks * about.f_frsize + (1 << 20)
    name = f"commplane-native-{os.getpid()}-full"
    _native.Segment.create(name, nbytes)
    try:
        with pytest.raises(_native.NativeError) as caught:
            _native.Segment.map(name, nbytes, 0, nbytes)
    finally:
        _native.Segment.unlink(name)
    assert caught.value.status == codes.ENOSPC
    assert caught.value.name == "ENOSPC"


def test_layout_and_options_are_checked() -> None:
    where = _native.layout(4, 1000)
    assert where.total == 4 * where.part_bytes
    assert where.offsets == tuple(rank * where.part_bytes for rank in range(4))
    assert where.part_bytes % 4096 == 0
    for world, staging in ((1, 4096), (65, 4096), (2, 0)):
        with pytest.raises(_native.NativeError, match="EINVAL"):
            _native.layout(world, staging)
    with pytest.raises(_native.NativeError, match="EUNSUPPORTED"):
        _native.set_isa("mmx")
    assert _native.isa() in ("baseline", "avx2", "avx512", "avx512_bf16")


def test_statuses_are_those_of_the_library() -> None:
    names = _native.load().library.commplane_car_status_name
    names.restype, names.argtypes = ctypes.c_char_p, [ctypes.c_int]
    assert {code: names(code).decode() for code in codes.STATUS} == codes.STATUS


def test_another_abi_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "ABI_MAJOR", 7)
    with pytest.raises(ImportError, match=rf"wanted 7\.x, found {codes.ABI_MAJOR}\.\d+"):
        _native.load()


def test_a_missing_or_foreign_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="cannot load"):
        _native.load(library=tmp_path / "nothing.so")
    with pytest.raises(ImportError, match="wanted auto, abi3 or ctypes, found 'swig'"):
        _native.load("swig")


def test_only_our_names_are_exported() -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(_native.load().path)], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    assert names
    assert all(name.startswith("commplane_car_") for name in names), names


def test_importing_the_package_loads_no_native_code() -> None:
    code = "import sys, commplane_custom_ar; sys.exit('commplane_custom_ar._native' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
