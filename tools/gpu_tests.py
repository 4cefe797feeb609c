"""What is run on a machine with GPUs: the tests marked gpu, the kit on cuda, compute-sanitizer. Ends with 1 if any part fails.

python tools/gpu_tests.py [--no-sanitize] [--no-kit] [options of pytest]    with the Python that has torch and the wheels
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KIT = ("--pyargs", "commplane_conformance", "--commplane-device=cuda", "-q", "-p", "no:cacheprovider")
MARKS = "mark.gpu", "needs_gpu()", "pytestmark = marks()"
SKIPPED = "--no-sanitize", "--no-kit"
BACKENDS = {"torch": "core", "custom_ar": "comm-custom-ar", "flashinfer": "comm-flashinfer"}
"""Those that the kit is run for, and whose package has what is expected of them."""
WANTS = {"comm-flashinfer": ("commplane_flashinfer", "flashinfer")}
"""Modules that are not there on every machine with GPUs, by the package whose parts want them."""


def gpus() -> int:
    """How many CUDA devices torch sees. In a process of its own."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


def absent(package: str) -> list[str]:
    """The modules that the parts of `package` want and that are not installed. Local."""
    return [name for name in WANTS.get(package, ()) if importlib.util.find_spec(name) is None]


def left_out() -> list[str]:
    """What does not run for want of a module, a line each."""
    return [
        f"{package}: its tests and the kit for it were not run, {' and '.join(missing)} is not installed"
        for package in WANTS
        if (missing := absent(package))
    ]


def parts(options: list[str], count: int) -> list[tuple[str, list[str], str]]:
    """What to run: its name, the command, and where."""
    # Only modules that have such tests: others may want what is not installed there.
    modules = sorted(ROOT.glob("packages/*/tests/**/test_*.py"))
    tests = [path for path in modules if any(mark in path.read_text(encoding="utf-8") for mark in MARKS)]
    rest = [option for option in options if option not in SKIPPED]
    out = []
    for package in sorted({path.relative_to(ROOT).parts[1] for path in tests}):  # each has kept ranks and an MPS of its own
        if absent(package):
            continue
        own = [str(path) for path in tests if path.relative_to(ROOT).parts[1] == package]
        out.append((f"tests, {package}", [sys.executable, "-m", "pytest", "-m", "gpu", *own, *rest], str(ROOT)))
    if "--no-kit" not in options and count >= 2:
        for name, package in BACKENDS.items():
            if absent(package):
                continue
            # From an empty folder, as the kit wants it.
            command = [
                sys.executable,
                "-m",
                "pytest",
                *KIT,
                f"--commplane-backend={name}",
                f"--commplane-ranks={ranks(name, count)}",
            ]
            expected = ROOT / "packages" / package / "conformance-expected-failures-cuda.txt"
            if expected.exists():
                command.append(f"--commplane-expected-failures={expected}")
            out.append((f"kit, {name}", command, ""))
    if "--no-sanitize" not in options and count >= 2:
        if shutil.which("compute-sanitizer"):
            out.append(("compute-sanitizer", [sys.executable, str(ROOT / "tools" / "gpu_sanitize.py")], str(ROOT)))
        else:
            out.append(("compute-sanitizer", ["compute-sanitizer", "--version"], str(ROOT)))  # which fails with its own words
    return out


def ranks(backend: str, count: int) -> str:
    """Sizes of the kit's groups: one rank a GPU, and for flashinfer those that it has kernels for."""
    return ",".join(str(n) for n in ((2, 4, 8) if backend == "flashinfer" else (2, 3, 4, 8)) if n <= count)


def main(options: list[str]) -> int:
    """Each part in turn, also after one that failed."""
    count = gpus()
    if count == 0:
        print("wanted a CUDA device, torch sees none: nothing was run")
        return 1
    failed = []
    for name, command, where in parts(options, count):
        begun = time.monotonic()
        print(f"--- {name}: {' '.join(command)}", flush=True)
        with tempfile.TemporaryDirectory() as empty:
            try:
                code = subprocess.run(command, cwd=where or empty, check=False).returncode
            except FileNotFoundError as error:
                print(error, flush=True)
                code = 127
        print(f"--- {name}: exit code {code}, {time.monotonic() - begun:.0f} s", flush=True)
        if code:
            failed.append(name)
    for line in [*left_out(), *(["one GPU: the kit and compute-sanitizer want two"] if count < 2 else [])]:
        print(line)
    print(f"failed: {', '.join(failed)}" if failed else "all well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
