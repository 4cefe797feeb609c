"""The code in the README is code: it is taken from the page and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

README = (ROOT / "README.md").read_text()


def block(title: str) -> str:
    """The fenced block with this title."""
    found = re.findall(rf"^```\w+ title={re.escape(title)}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"wanted one block titled {title!r} in README.md, found {len(found)}"
    return str(found[0])


def test_the_example_prints_what_the_page_says(commplane: Any, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block("example.py"))
    out = commplane("run", "--ranks", "2", "example.py")
    assert out.returncode == 0, out.stderr
    printed = re.search(r"^prints\n\n```text\n(.*?)```$", README, re.MULTILINE | re.DOTALL)
    assert printed is not None
    assert out.stdout == printed[1]
    assert len(block("example.py").splitlines()) <= 22


@pytest.mark.skipif(" " in torch.__file__, reason="torch's compiler cannot link where the path of torch has a space")
def test_the_parallel_mlp_compiles_and_trains(commplane: Any, tmp_path: Path) -> None:
    (tmp_path / "parallel_mlp.py").write_text(block("parallel_mlp.py") + "    assert up.grad.abs().sum() > 0\n")
    out = commplane("run", "--ranks", "2", "parallel_mlp.py")
    assert out.returncode == 0, out.stderr


def test_the_lines_for_torch_run_under_torchrun_with_no_other_import(tmp_path: Path) -> None:
    (tmp_path / "through_torch.py").write_text(block("through_torch.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "through_torch.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines() == ["commplane [2.0, 2.0, 2.0, 2.0]"]


def test_the_backend_in_40_lines_builds_as_a_wheel_and_runs(commplane: Any, tmp_path: Path) -> None:
    source, site = tmp_path / "star", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "commplane_star.py"):
        (source / name).write_text(block(name))
    assert len(block("commplane_star.py").splitlines()) <= 40
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-build-isolation", "--target", str(site), str(source)], check=True)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    doctor = commplane("doctor", "--json", env={"PYTHONPATH": path})
    assert doctor.returncode == 0, doctor.stderr
    candidates = {c["name"]: c["state"] for c in json.loads(doctor.stdout)["plan"]["candidates"]}
    ready = dict.fromkeys(("custom_ar", "star", "torch"), "ready")
    assert candidates == {**ready, "flashinfer": "probe", "hierarchical": "probe", "torch_symm": "probe"}
    (tmp_path / "script.py").write_text(
        "import torch, commplane\n"
        "with commplane.init() as plane:\n"
        "    tp = plane.communicator('tp')\n"
        "    assert tp.plan.explain().chosen == 'star'\n"
        "    x = torch.arange(6.0).reshape(2, 3)\n"
        "    assert torch.equal(tp.all_reduce(x), 2 * x)\n"
    )
    out = commplane("run", "--ranks", "2", "script.py", env={"PYTHONPATH": path, "COMMPLANE_BACKENDS": "star"})
    assert out.returncode == 0, out.stderr


def test_every_file_that_the_page_names_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
