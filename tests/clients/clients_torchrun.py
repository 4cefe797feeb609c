"""One torchrun job of two ranks, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["run_job"]


_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}


def run_job(folder: Path, parts: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """Run clients_job.py with `parts` for at most `seconds`: what each rank left.

    Raises:
        AssertionError: with the job's output, where it failed or took too long.
    """
    job = Path(__file__).with_name("clients_job.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(job), str(folder), *parts]
    with (folder / "output").open("w") as output:
        launcher = subprocess.Popen(command, env={**os.environ, **_OFFLINE}, stdout=output, stderr=output)
        try:
            code: int | None = launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if launcher.poll() is None:
                launcher.terminate()  # on which torchrun ends its ranks; killed, it would leave them
                launcher.wait(60)
    assert code == 0, f"{' '.join(parts)}: {'took too long' if code is None else code}\n{(folder / 'output').read_text()}"
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
