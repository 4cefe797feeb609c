"""Processes as ranks: real ones, that can be killed. The store lives in the caller, as it does under torchrun."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "run_processes"]


@dataclass(frozen=True)
class Outcome:
    """How one rank ended.

    Attributes:
        returncode: of the process; negative for a signal, None if it was still running at the end and was killed.
        result: what the function returned, as JSON holds it.
        error: name of the class of the exception it raised, or None.
        message: text of that exception.
        output: standard output and error.
    """

    rank: int
    returncode: int | None
    result: Any
    error: str | None
    message: str
    output: str


def run_processes(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    env: Callable[[int], Mapping[str, str]] = lambda _rank: {},
    timeout: float = 60.0,
    command: Callable[[int], Sequence[str]] = lambda _rank: [sys.executable],
    address: str = "127.0.0.1",
) -> list[Outcome]:
    """Call ``function(store, rank, world_size, *args)`` in `world_size` new processes.

    Args:
        world_size: number of ranks.
        function: a module-level function; its file is loaded by path in each process, where what the caller can import is found
            too. The result must be JSON.
        args: JSON values.
        env: variables to set on a rank beside the caller's.
        timeout: seconds until those still running are killed.
        command: how Python is started on a rank; for namespaces and tools.
        address: of this process as the ranks see it.
    """
    from torch.distributed import TCPStore

    code = sys.modules[function.__module__].__file__
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(world_size):
            job = {
                "file": str(code),
                "function": function.__name__,
                "args": args,
                "path": sys.path,
                "rank": rank,
                "world_size": world_size,
                "address": address,
                "port": store.port,
                "out": f"{folder}/{rank}.json",
            }
            log = open(f"{folder}/{rank}.log", "w+")  # noqa: SIM115  closed below
            process = subprocess.Popen(
                [*command(rank), "-m", "commplane.testing.processes", json.dumps(job)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **env(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            running.append((process, log, Path(str(job["out"]))))
        deadline = time.monotonic() + timeout
        for rank, (process, log, out) in enumerate(running):
            try:
                code_: int | None = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code_ = None
            log.seek(0)
            text = log.read()
            log.close()
            said = json.loads(out.read_text()) if out.exists() else {}
            outcomes.append(Outcome(rank, code_, said.get("result"), said.get("error"), said.get("message", ""), text))
    return outcomes


def _main(job: dict[str, Any]) -> int:
    from torch.distributed import TCPStore

    spec = importlib.util.spec_from_file_location("commplane_rank_main", job["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(job["file"]).parent))
    sys.path.extend(p for p in job["path"] if p not in sys.path)
    spec.loader.exec_module(module)
    store = TCPStore(job["address"], job["port"], is_master=False)
    said: dict[str, Any] = {}
    try:
        said["result"] = getattr(module, job["function"])(store, job["rank"], job["world_size"], *job["args"])
    except Exception as error:  # reported to the parent, which asserts on it
        traceback.print_exc()
        said.update(error=type(error).__name__, message=str(error))
    partial = Path(job["out"] + ".part")
    partial.write_text(json.dumps(said))
    partial.rename(job["out"])
    return 1 if "error" in said else 0


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1])))
