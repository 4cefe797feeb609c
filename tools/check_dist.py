"""Check built wheels beyond what metadata tools see. python tools/check_dist.py [--cuda | --no-cuda] FILE ...

With ``--cuda`` the native library has to have machine code for GPUs, with ``--no-cuda`` none; both load where there is no driver.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from workspace import Package, packages

__all__ = ["check_wheel"]

PREFIX = "commplane_car_"


def check_wheel(path: Path, package: Package, cuda: bool | None = None) -> list[str]:
    """What is wrong with one wheel, one sentence each; `cuda`: whether it has to have a half for GPUs, None for either."""
    problems = []
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as scratch:
        names = wheel.namelist()
        if f"{package.module}/py.typed" not in names:
            problems.append("wanted py.typed, found none: types would not reach users")
        if not any(n.endswith(".dist-info/licenses/LICENSE") for n in names):
            problems.append("wanted the licence in the metadata, found none")
        natives = [n for n in names if n.endswith(".so")]
        pure = path.stem.endswith("py3-none-any")
        if bool(natives) == pure:
            problems.append(f"wanted a platform tag exactly where there is native code, found {path.name} with {natives}")
        if natives and "-py3-none-" not in path.name:
            problems.append(f"wanted tag py3-none-PLATFORM (one wheel for every Python), found {path.name}")
        for name in natives:
            problems.extend(_check_native(Path(wheel.extract(name, scratch)), cuda))
    return problems


def _check_native(library: Path, cuda: bool | None) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        return ["wanted nm (binutils) to read what the library exports, found none"]
    exported = [line.split()[-1] for line in _lines(nm, "-D", "--defined-only", str(library))]
    needed = {line.split()[-1].partition("@")[0] for line in _lines(nm, "-D", "--undefined-only", str(library))}
    if library.name.startswith("_fastcall"):
        return [] if exported == ["PyInit__fastcall"] else [f"{library.name}: wanted only PyInit__fastcall, found {exported}"]
    problems = []
    wrong = [symbol for symbol in exported if not symbol.startswith(PREFIX)]
    if wrong or not exported:
        problems.append(f"{library.name}: wanted only symbols {PREFIX}*, found {wrong or 'none at all'}")
    foreign = sorted(symbol for symbol in needed if symbol.startswith(("Py", "_Py", "_ZN2at", "_ZN3c10", "_ZN5torch")))
    if foreign:
        problems.append(f"{library.name}: wanted neither Python nor torch in it, found {foreign}")
    return problems + _check_cuda(library, cuda)


def _check_cuda(library: Path, cuda: bool | None) -> list[str]:
    """The CUDA half, or what stands in its place, answers on a machine without a driver: nothing of CUDA is linked to."""
    problems = []
    readelf = shutil.which("readelf")
    if readelf is None:
        return ["wanted readelf (binutils) to read what the library needs, found none"]
    needs = [line.split("[")[-1].rstrip("]") for line in _lines(readelf, "-d", str(library)) if "(NEEDED)" in line]
    linked = [name for name in needs if name.startswith(("libcuda", "libnvidia"))]
    if linked:
        problems.append(f"{library.name}: wanted no library of CUDA to be needed, found {linked}")
    found = any(".nv_fatbin" in line for line in _lines(readelf, "-SW", str(library)))
    if cuda is not None and found != cuda:
        problems.append(f"{library.name}: wanted {'' if cuda else 'no '}code for GPUs, found {'some' if found else 'none'}")
    loaded = ctypes.CDLL(str(library))
    loaded.commplane_car_last_error.restype = ctypes.c_char_p
    if loaded.commplane_car_cuda_check() != 0:
        print(f"{library.name}: {loaded.commplane_car_last_error().decode()}")
    return problems


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main(files: list[str]) -> int:
    """Check every wheel among `files`; 1 if anything is wrong."""
    by_name = {p.dist.replace("-", "_"): p for p in packages()}
    cuda = True if "--cuda" in files else False if "--no-cuda" in files else None
    wheels = [Path(f) for f in files if f.endswith(".whl")]
    failed = not wheels
    for wheel in wheels:
        problems = check_wheel(wheel, by_name[wheel.name.split("-")[0]], cuda)
        failed = failed or bool(problems)
        print(f"{wheel.name}: {'; '.join(problems) or 'as it should be'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
