"""tests/gpu/gpu_mps.py: a command runs under an MPS daemon of its own, which goes with it. Here the daemon is a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(60)

TOOL = Path(__file__).parent / "gpu" / "gpu_mps.py"
CONTROL = """#!/bin/sh
echo "$* $(cat) $CUDA_MPS_PIPE_DIRECTORY" >> {notes}
"""
SHOW = "import json, os, sys; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('CUDA_')})); sys.exit(7)"


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, Any]:
    """Variables of a machine whose nvidia-cuda-mps-control writes to `notes`."""
    control, notes = tmp_path / "nvidia-cuda-mps-control", tmp_path / "notes"
    control.write_text(CONTROL.format(notes=notes))
    control.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
    return {"env": {**env, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, "notes": notes}


def notes(machine: dict[str, Any]) -> tuple[list[str], Path]:
    """What the daemon was told, and its folder."""
    calls = [line.split() for line in machine["notes"].read_text().splitlines()]
    (pipe,) = {words[-1] for words in calls}
    return [word for words in calls for word in words[:-1]], Path(pipe).parent


@pytest.mark.parametrize(("visible", "shown"), [(None, "0"), ("3,5", "3")])
def test_the_command_shares_the_first_gpu_and_its_exit_code_is_the_answer(
    machine: dict[str, Any], visible: str | None, shown: str
) -> None:
    env = machine["env"] | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    done = subprocess.run([sys.executable, TOOL, "4", sys.executable, "-c", SHOW], env=env, capture_output=True, timeout=50)
    found, (told, folder) = json.loads(done.stdout), notes(machine)
    assert done.returncode == 7
    assert (found["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"], found["CUDA_VISIBLE_DEVICES"]) == ("25", shown)
    assert found["CUDA_MPS_PIPE_DIRECTORY"] == f"{folder}/pipe"
    assert told == ["-d", "quit"]
    assert not folder.exists()


def test_a_command_that_is_ended_takes_its_daemon_with_it(machine: dict[str, Any]) -> None:
    sleeps = "import os, time; print(os.getpid(), flush=True); time.sleep(50)"
    with subprocess.Popen(
        [sys.executable, TOOL, "2", sys.executable, "-c", sleeps], env=machine["env"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(50) == 128 + signal.SIGTERM
    told, folder = notes(machine)
    assert told == ["-d", "quit"] and not folder.exists()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}").exists()


def test_without_mps_it_says_what_it_wants(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TOOL, "2", "true"], env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 1
    assert done.stderr == "wants nvidia-cuda-mps-control, found no such command: take one GPU a rank\n"
