# SPDX-License-Identifier: Apache-2.0
"""What Python knows of ``commplane_car_cuda.h`` is what a C compiler reads there; a build without nvcc has it all."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from commplane_custom_ar import _library, _native, codes
from commplane_custom_ar.cuda import abi

pytestmark = pytest.mark.timeout(120)

CSRC = Path(__file__).parent.parent / "csrc"
HEADER = CSRC / "include/commplane_car_cuda.h"
STRUCTS = {"choice": abi.Choice, "options": abi.Options, "detail": abi.Detail}


def declared() -> dict[str, list[str]]:
    """The functions of the header by name, with the types and names of what they take."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    found = re.findall(r"COMMPLANE_CAR_API int commplane_car_cuda_(\w+)\(([^)]*)\);", text)
    return {name: [] if arguments == "void" else [a.strip() for a in arguments.split(",")] for name, arguments in found}


def test_structs_have_the_sizes_and_offsets_that_a_c_compiler_gives_them(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    lines, wanted = [], []
    for name, struct in STRUCTS.items():
        c_type = f"commplane_car_cuda_{name}"
        lines.append(f'printf("%zu\\n", sizeof({c_type}));')
        wanted.append(ctypes.sizeof(struct))
        for field, *_ in struct._fields_:
            lines.append(f'printf("%zu %zu\\n", offsetof({c_type}, {field}), sizeof((({c_type}*)0)->{field}));')
            at = getattr(struct, field)
            wanted.append((at.offset, at.size))
    source = tmp_path / "sizes.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "commplane_car_cuda.h"\n'
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    program = tmp_path / "sizes"
    command = ["cc", "-std=c99", "-pedantic-errors", "-Werror", "-I", str(HEADER.parent), str(source), "-o", str(program)]
    subprocess.run(command, check=True, timeout=60)
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
    assert [tuple(map(int, s.split())) if " " in s else int(s) for s in said] == wanted


def test_numbers_are_those_of_the_header() -> None:
    text = HEADER.read_text()
    found = {name.lower(): int(number) for name, number in re.findall(r"COMMPLANE_CAR_CUDA_(\w+) = (\d+)", text)}
    assert found == abi.ALGORITHMS
    defined = {name: int(number) for name, number in re.findall(r"#define COMMPLANE_CAR_CUDA_(\w+) (\d+)", text)}
    assert defined == {
        "MAX_WORLD": abi.MAX_WORLD,
        "HANDLE_BYTES": abi.HANDLE_BYTES,
        "CONTROL_BYTES": abi.CONTROL_BYTES,
        "MAX_CHOICES": abi.MAX_CHOICES,
    }


def test_every_function_of_the_header_is_in_the_library_with_as_many_arguments() -> None:
    library = _native.load().library
    functions = declared()
    assert len(functions) > 30
    bound = {name: getattr(library, f"commplane_car_cuda_{name}").argtypes for name in functions}
    # What the gate's own processes call alone has its prototypes in gpu/memory.py.
    assert {name for name, types in bound.items() if types is None} == {"device_count", "memory_poke", "memory_peek"}
    for name, types in bound.items():
        assert types is None or len(types) == len(functions[name]), name
        for given, declared_as in zip(types or (), functions[name], strict=types is not None):
            wanted = 8 if "*" in declared_as or "[" in declared_as or "uint64_t" in declared_as else 4
            assert ctypes.sizeof(given) == wanted, (name, declared_as)


def test_a_build_without_nvcc_has_every_function_and_each_says_why(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    library = tmp_path / "libabsent.so"
    rest = tmp_path / "rest.cc"  # of cpu/c_api.cc, which would need all of the CPU half
    rest.write_text(
        '#include "error.h"\nextern "C" const char* commplane_car_last_error() { return commplane_car::last_error(); }\n'
    )
    sources = [str(CSRC / "cuda/absent.cc"), str(CSRC / "cpu/error.cc"), str(rest)]
    folders = ["-I", str(HEADER.parent), "-I", str(CSRC / "cpu")]
    subprocess.run(["c++", "-std=c++17", "-shared", "-fPIC", *folders, *sources, "-o", str(library)], check=True, timeout=100)
    loaded = ctypes.CDLL(str(library))
    loaded.commplane_car_last_error.restype = ctypes.c_char_p
    for name, arguments in declared().items():
        function = getattr(loaded, f"commplane_car_cuda_{name}")
        assert function(*(ctypes.c_void_p() for _ in arguments)) == codes.EUNSUPPORTED, name
        assert b"no CUDA half: nvcc was not found when it was built" in loaded.commplane_car_last_error(), name
    abi.bind_prototypes(loaded)


def test_cmake_leaves_the_cuda_half_out_where_it_is_told_to_and_says_so(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here")
    command = ["cmake", "-S", str(CSRC.parent), "-B", str(tmp_path), "-DCOMMPLANE_CAR_CUDA=OFF"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "the CUDA half is left out" in done.stdout
    assert "CMAKE_CUDA_COMPILER" not in (tmp_path / "CMakeCache.txt").read_text()


def test_an_older_library_is_refused_with_what_to_do(tmp_path: Path) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    source = tmp_path / "old.c"
    source.write_text(f"unsigned commplane_car_abi_version(void) {{ return {codes.ABI_MAJOR}u << 16; }}\n")
    library = tmp_path / "libcommplane_car.so"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True, timeout=60)
    with pytest.raises(_library.NativeLibraryError, match=r"is older than this module .*reinstall commplane-custom-ar"):
        _library.load(library=library)


def test_a_binding_of_another_version_is_refused_by_the_number_of_functions() -> None:
    native = _native.load()
    if native.binding != "abi3":
        pytest.skip("this build has no abi3 binding")
    module = _library._load_fastcall(native.path)
    assert module is not None
    with pytest.raises(TypeError, match="takes the addresses of 13 functions, found 7"):
        module.bind(*range(7))
