"""Memcheck and racecheck of custom_ar's kernels: two ranks on two GPUs, each a process under compute-sanitizer.

python tools/gpu_sanitize.py [memcheck racecheck ...]    ends with 1 if any tool reports an error or a result is wrong

The ranks call the native library without torch, which under these tools takes minutes to start: every algorithm and collective,
at small sizes with tails. It wants two GPUs, because the tools do not work under MPS.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

RANK = Path(__file__).with_name("gpu_sanitize_rank.py")
LIMIT_S = 400.0
FOUND = 77


def check(tool: str, folder: Path) -> bool:
    """Whether both ranks end well under `tool`; prints what they wrote if not."""
    begun = time.monotonic()
    logs = [folder / f"{tool}-{rank}.log" for rank in range(2)]
    (folder / "control").write_bytes(bytes(4096))
    running = []
    for rank, log in enumerate(logs):
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND)]
        command = ["compute-sanitizer", *options, sys.executable, str(RANK), str(rank), str(folder)]
        with log.open("w") as out:
            running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    codes: list[int | None] = []
    for process in running:
        try:
            codes.append(process.wait(max(1.0, begun + LIMIT_S - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(None)
    well = codes == [0, 0] and all("all right" in log.read_text() for log in logs)
    print(f"{tool}: exit codes {codes}, {time.monotonic() - begun:.0f} s, {'clean' if well else 'NOT CLEAN'}", flush=True)
    for log in logs:
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-2:] if well else lines[-80:]), flush=True)
    return well


def main(tools: list[str]) -> int:
    """Each tool in turn; 0 if all are clean."""
    results = []
    for tool in tools or ["memcheck", "racecheck"]:
        # In memory: the page of control in it is pinned for the GPUs, which a page of a disk may not be.
        with tempfile.TemporaryDirectory(prefix="sanitize-", dir="/dev/shm") as folder:
            results.append(check(tool, Path(folder)))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
