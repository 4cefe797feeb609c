"""What is published of a machine with GPUs, one rank a GPU: python tools/gpu_results.py [PART ...].

Parts, in this order, all of them if none is named; ``--ranks N`` for fewer than there are GPUs:
  doctor   what commplane finds there
  kit      the conformance kit on cuda for torch, custom_ar and flashinfer
  bench    all-reduce and its fused norm, in graphs and eager, in one group of all ranks and in two that work at once:
           a JSON file each in docs/results, and at which sizes custom_ar is the fastest
  tunings  the timings that core ships for such a machine, of those files

Under tests/gpu/gpu_mps.py all ranks share one GPU: NCCL and torch's symmetric memory, which take no two ranks there, are left out
of the bench, and so are the kit and the timings. Ends with 1 if any part fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import gpu_tests

ROOT = Path(__file__).resolve().parent.parent
PARTS = "doctor", "kit", "bench", "tunings"
RESULTS = ROOT / "docs" / "results"
SHIPPED = ROOT / "packages" / "core" / "src" / "commplane" / "tunings"
OURS, NCCL = "custom_ar", "torch"
LIMIT = 8 << 20
"""Bytes up to which we mean to be the fastest of all; above, not slower than NCCL."""

# FlashInfer's own default is 8 MiB a message and 1 GiB a workspace, which is too little to compare at 64 MiB.
ROOM = {"COMMPLANE_FLASHINFER_MAX_BYTES": str(64 << 20), "COMMPLANE_FLASHINFER_MAX_WORKSPACE_BYTES": str(8 << 30)}
_SIZES = "1K,2K,4K,8K,16K,32K,64K,128K,256K,512K,1M,2M,4M,8M"
_ABOVE = ",16M,32M,64M"
_BACKENDS = "custom_ar,flashinfer,flashinfer:one_shot,flashinfer:two_shot"
_TORCH_SYMM = ",torch_symm:one_shot,torch_symm:two_shot"

Rows = Sequence[Mapping[str, Any]]


def benches(ranks: int, shared: bool) -> dict[str, list[str]]:
    """The arguments of `commplane` by the file that it writes. Pure."""
    stem = f"one-gpu-{ranks}" if shared else f"cuda-{ranks}"
    # Above the cache of one GPU, what its ranks move says nothing about the links between several.
    sizes, backends = _SIZES + ("" if shared else _ABOVE), _BACKENDS + ("" if shared else _TORCH_SYMM)
    common = ["bench", "--device", "cuda", "--ranks", str(ranks), "--dtypes", "bfloat16"]
    common += ["--collectives", "all_reduce,all_reduce_rms_norm", "--out-of-place", "--sizes", sizes, "--backends", backends]
    ways = {"graph": ["--graph"], "eager": []}
    if ranks >= 4 and ranks % 2 == 0:
        ways["groups"] = ["--graph", "--groups", "2"]
    files = {name: f"{stem}-{name}.json" for name in ways}
    return {files[name]: [*common, *more, "--json", f"docs/results/{files[name]}", "--quiet"] for name, more in ways.items()}


def verdict(rows: Rows) -> list[str]:
    """At which sizes custom_ar is the fastest up to `LIMIT`, and not slower than NCCL above: a line for each kind of call. Pure.

    Once with ordinary tensors on all sides, and once where each side may have its tensor in symmetric memory.
    """
    lines = []
    calls = dict.fromkeys((r["collective"], r["graph"], r.get("groups", 1), r["ranks"]) for r in rows)
    for collective, graph, groups, ranks in calls:
        of_call = [r for r in rows if (r["collective"], r["graph"], r.get("groups", 1)) == (collective, graph, groups)]
        who = f"{ranks} ranks" if groups == 1 else f"{groups} groups of {ranks} ranks"
        subject = f"{collective}, {who}, {'in graphs' if graph else 'eager'}"
        for words, fits in (("ordinary tensors", _ordinary), ("any memory", lambda _row: True)):
            found = _against([r for r in of_call if fits(r)])
            lines += [f"{subject}, {words}: {line}" for line in found]
    return lines


def _ordinary(row: Mapping[str, Any]) -> bool:
    return "symmetric" not in row["mode"]


def _against(rows: Rows) -> list[str]:
    """Up to `LIMIT` against all others, above against NCCL. Pure."""
    goals: list[tuple[str, Callable[[int], bool], Callable[[str], bool]]] = [
        ("the fastest up to 8 MiB", lambda n: n <= LIMIT, lambda backend: backend != OURS),
        ("not slower than NCCL above", lambda n: n > LIMIT, lambda backend: backend == NCCL),
    ]
    lines = []
    for goal, at, other in goals:
        sizes = sorted({r["bytes"] for r in rows if at(r["bytes"])})
        compared, missed = 0, []
        for n in sizes:
            ours = [r for r in rows if r["bytes"] == n and r["backend"] == OURS]
            others = [r for r in rows if r["bytes"] == n and other(r["backend"])]
            if not ours or not others:
                continue
            compared += 1
            mine, best = min(ours, key=_us), min(others, key=_us)
            if _us(mine) > _us(best):
                names = f"{_us(mine):.2f} us, {best['backend']} {best['mode']} {_us(best):.2f}"
                missed.append(f"{n} bytes ({names}, {_us(mine) / _us(best):.2f})")
        if compared:
            lines.append(
                f"{goal} at {compared - len(missed)} of {compared} sizes" + (f"; not at {', '.join(missed)}" * bool(missed))
            )
    return lines


def _us(row: Mapping[str, Any]) -> float:
    return float(row["median_us"])


def machine() -> str:
    """One line about this machine, from a process of its own."""
    code = (
        "import torch, platform, os, importlib.metadata as m\n"
        "gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "wheels = ', '.join(f'{n} {found[n]}' for n in sorted(found) if n.startswith('commplane') or n == 'flashinfer-python')\n"
        "print(f'{len(gpus)} x GPU {gpus[0]}, {os.cpu_count()} cores, Python {platform.python_version()}, '\n"
        "      f'torch {torch.__version__}, {wheels}')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout.strip()


def _timed(name: str, command: Sequence[str], env: Mapping[str, str], where: str | Path = ROOT) -> bool:
    """Run one command with its output on ours; whether it ended with 0."""
    shown = " ".join(Path(word).name if word == sys.executable else word.replace(f"{ROOT}/", "") for word in command)
    print(f"--- {name}: {shown}", flush=True)
    begun = time.monotonic()
    code = subprocess.run(command, cwd=where, env={**os.environ, **env}, stderr=subprocess.STDOUT, check=False).returncode
    print(f"--- {name}: exit code {code}, {time.monotonic() - begun:.0f} s", flush=True)
    return code == 0


def _doctor(ranks: int, _shared: bool) -> list[str]:
    command = [sys.executable, "-m", "commplane", "doctor", "--ranks", str(ranks)]
    return [] if _timed("doctor", command, {}) else ["doctor"]


def _kit(ranks: int, _shared: bool) -> list[str]:
    failed = []
    for name, command, _ in gpu_tests.parts(["--no-sanitize"], ranks):
        if not name.startswith("kit, "):
            continue
        with tempfile.TemporaryDirectory() as empty:
            failed += [] if _timed(name, command, {}, empty) else [name]
    return failed


def _bench(ranks: int, shared: bool) -> list[str]:
    failed, rows = [], []
    for name, arguments in benches(ranks, shared).items():
        if _timed(name, [sys.executable, "-m", "commplane", *arguments], {} if shared else ROOM):
            rows += json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]
        else:
            failed.append(name)
    print("\n".join(verdict(rows)), flush=True)
    return failed


def _tunings(ranks: int, _shared: bool) -> list[str]:
    files = [RESULTS / f"cuda-{ranks}-{way}.json" for way in ("graph", "eager")]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        print(f"tunings: wanted {' and '.join(missing)}, which the part bench writes")
        return ["tunings"]
    gpu = json.loads(files[0].read_text(encoding="utf-8"))["machine"]["gpus"][0]
    out = SHIPPED / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}-x{ranks}.json"
    command = [sys.executable, str(ROOT / "tools" / "tunings.py"), *map(str, files), "--out", str(out)]
    return [] if _timed("tunings", command, {}) else ["tunings"]


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(PARTS)}, found {text}")
    return text


def main(given: Sequence[str]) -> int:
    """Each part in turn, also after one that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", type=_part, metavar="PART")
    parser.add_argument("--ranks", type=int, help="default all GPUs; to be given where ranks share one")
    options = parser.parse_args(given)
    shared = "CUDA_MPS_PIPE_DIRECTORY" in os.environ
    count = gpu_tests.gpus()
    ranks = options.ranks or (0 if shared else count)
    if count == 0 or ranks < 2 or (ranks > count and not shared):
        wanted = "--ranks of 2 or more" if shared else f"{max(2, ranks)} GPUs"
        print(f"wanted {wanted}, found {count} GPUs{' that ranks share' if shared else ''}: nothing was run")
        return 1
    wanted_parts = [part for part in PARTS if part in (options.parts or PARTS)]
    run = {"doctor": _doctor, "kit": _kit, "bench": _bench, "tunings": _tunings}
    left_out = [part for part in wanted_parts if shared and part in ("kit", "tunings")]
    before = f"python tests/gpu/gpu_mps.py {ranks} " if shared else ""
    share = ", which all ranks share" if shared else ""
    print(f"{machine()}{share}\n# {' '.join([f'{before}python tools/gpu_results.py', *given])}", flush=True)
    failed = [name for part in wanted_parts if part not in left_out for name in run[part](ranks, shared)]
    for line in [*gpu_tests.left_out(), *(f"{part}: wants a GPU a rank" for part in left_out)]:
        print(f"left out: {line}")
    print(f"failed: {', '.join(failed)}" if failed else "all well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
