"""What is published of a machine with GPUs, one rank a GPU: python tools/gpu_results.py [PART ...].

Parts, in this order, all of them if none is named; ``--ranks N`` for fewer than there are GPUs:
  doctor   what commplane finds there
  kit      the conformance kit on cuda for torch, custom_ar and flashinfer
  graph    all-reduce and its fused norm in replayed graphs, eager the same launched by the host, groups in two groups at once:
  eager    a JSON file each in docs/results; at the end at which sizes custom_ar is the fastest, and which of its algorithms is;
  groups   `bench` is all three
  tunings  the timings that core ships for such a machine, of the first two files

Under tests/gpu/gpu_mps.py all ranks share one GPU: NCCL and torch's symmetric memory, which take no two ranks there, are left out
of the benches, and so are the kit and the timings. Ends with 1 if any part fails.
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
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import gpu_tests
from gpu_verdict import NCCL, verdict

ROOT = Path(__file__).resolve().parent.parent
PARTS = "doctor", "kit", "graph", "eager", "groups", "tunings"
BENCHES = PARTS[2:5]
RANKS = 2, 4, 8
"""What all that is compared has kernels for."""
RESULTS = ROOT / "docs" / "results"
SHIPPED = ROOT / "packages" / "core" / "src" / "commplane" / "tunings"

# FlashInfer's own default is 8 MiB a message and 1 GiB a workspace, which is too little to compare at 64 MiB.
ROOM = {"COMMPLANE_FLASHINFER_MAX_BYTES": str(64 << 20), "COMMPLANE_FLASHINFER_MAX_WORKSPACE_BYTES": str(8 << 30)}
_SIZES = "1K,2K,4K,8K,16K,32K,64K,128K,256K,512K,1M,2M,4M,8M"
_ABOVE = ",16M,32M,64M"
_BACKENDS = "custom_ar,flashinfer,flashinfer:one_shot,flashinfer:two_shot"
# Where ranks have a GPU each: what takes no two on one, and our own algorithms at every size, to see which overtakes which.
_MORE = ",torch_symm:one_shot,torch_symm:two_shot,custom_ar:one_shot_push,custom_ar:two_shot_push"


def stem(ranks: int, shared: bool) -> str:
    """What the names of the files begin with. Pure."""
    return f"one-gpu-{ranks}" if shared else f"cuda-{ranks}"


def benches(ranks: int, shared: bool) -> dict[str, list[str]]:
    """The arguments of `commplane` by the file that it writes. Pure."""
    # Above the cache of one GPU, what its ranks move says nothing about the links between several.
    sizes, backends = _SIZES + ("" if shared else _ABOVE), _BACKENDS + ("" if shared else _MORE)
    common = ["bench", "--device", "cuda", "--ranks", str(ranks), "--dtypes", "bfloat16"]
    common += ["--collectives", "all_reduce,all_reduce_rms_norm", "--out-of-place", "--sizes", sizes, "--backends", backends]
    ways: dict[str, list[str]] = {"graph": ["--graph"], "eager": []}
    if ranks >= 4:
        ways["groups"] = ["--graph", "--groups", "2"]
    files = {name: f"{stem(ranks, shared)}-{name}.json" for name in ways}
    return {files[name]: [*common, *more, "--json", f"docs/results/{files[name]}", "--quiet"] for name, more in ways.items()}


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


def _doctor(ranks: int) -> list[str]:
    command = [sys.executable, "-m", "commplane", "doctor", "--ranks", str(ranks)]
    return [] if _timed("doctor", command, {}) else ["doctor"]


def _kit(ranks: int) -> list[str]:
    failed = []
    for name, command, _ in gpu_tests.parts(["--no-sanitize"], ranks):
        if not name.startswith("kit, "):
            continue
        with tempfile.TemporaryDirectory() as empty:
            failed += [] if _timed(name, command, {}, empty) else [name]
    return failed


def _bench(ranks: int, shared: bool, ways: Sequence[str]) -> list[str]:
    failed, rows = [], []
    for name, arguments in benches(ranks, shared).items():
        if name.removeprefix(f"{stem(ranks, shared)}-").removesuffix(".json") not in ways:
            continue
        made = RESULTS / name
        made.unlink(missing_ok=True)  # of a run that fails nothing older is taken for its result
        if not _timed(name, [sys.executable, "-m", "commplane", *arguments], {} if shared else ROOM):
            failed.append(name)
            continue
        found = json.loads(made.read_text(encoding="utf-8"))["rows"]
        if not shared and not any(r["backend"] == NCCL for r in found):
            print(f"{name}: wanted NCCL to compare with, found no row of it")
            failed.append(name)
        rows += found
    print("\n".join(verdict(rows)), flush=True)
    return failed


def _tunings(ranks: int) -> list[str]:
    files = [RESULTS / f"{stem(ranks, shared=False)}-{way}.json" for way in ("graph", "eager")]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        print(f"tunings: wanted {' and '.join(missing)}, which the parts graph and eager write")
        return ["tunings"]
    gpu = json.loads(files[0].read_text(encoding="utf-8"))["machine"]["gpus"][0]
    out = SHIPPED / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}-x{ranks}.json"
    command = [sys.executable, str(ROOT / "tools" / "tunings.py"), *map(str, files), "--out", str(out)]
    return [] if _timed("tunings", command, {}) else ["tunings"]


def _part(text: str) -> str:
    if text not in (*PARTS, "bench"):
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(PARTS)} or bench, found {text}")
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
    asked = {part for name in options.parts or PARTS for part in (BENCHES if name == "bench" else (name,))}
    problem = _problem(ranks, count, shared) or (_uninstalled() if asked & set(BENCHES) else None)
    if problem is not None:
        print(f"{problem}: nothing was run")
        return 1
    before = f"python tests/gpu/gpu_mps.py {ranks} " if shared else ""
    share = ", which all ranks share" if shared else ""
    print(f"{machine()}{share}\n# {' '.join([f'{before}python tools/gpu_results.py', *given])}", flush=True)
    failed = _doctor(ranks) if "doctor" in asked else []
    failed += _kit(ranks) if "kit" in asked and not shared else []
    failed += _bench(ranks, shared, [way for way in BENCHES if way in asked]) if asked & set(BENCHES) else []
    failed += _tunings(ranks) if "tunings" in asked and not shared else []
    for part in ("kit", "tunings"):
        if shared and part in asked:
            print(f"left out: {part}: wants a GPU a rank")
    print(f"failed: {', '.join(failed)}" if failed else "all well")
    return 1 if failed else 0


def _problem(ranks: int, count: int, shared: bool) -> str | None:
    """Why this machine cannot run it."""
    if count == 0 or (ranks > count and not shared):
        return f"wanted {max(2, ranks)} GPUs, found {count}"
    return None if ranks in RANKS else f"wanted --ranks of 2, 4 or 8, found {ranks}"


def _uninstalled() -> str | None:
    """What a bench has to compare with and is not there."""
    missing = gpu_tests.absent("comm-flashinfer")
    return f"wanted {' and '.join(missing)} installed to compare with, found none of that name" if missing else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
