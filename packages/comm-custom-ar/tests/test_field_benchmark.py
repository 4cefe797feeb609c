# SPDX-License-Identifier: Apache-2.0
"""benchmarks/field.py without the libraries that it is for: it runs on custom_ar and Gloo alone and says what is left out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from field_candidates import Setup, candidates  # noqa: E402
from field_group import Group, GroupFailed  # noqa: E402
from field_report import Row, behind, ratios  # noqa: E402


def row(candidate: str, us: float, *, label: str | None = None, mean: float | None = None) -> Row:
    return Row(candidate, label or candidate, True, "float32", 64, 10, [us], [us if mean is None else mean])


@pytest.mark.long
@pytest.mark.timeout(170)
def test_it_compares_what_is_there_and_says_what_is_not(tmp_path: Path) -> None:
    out = tmp_path / "field.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "field.py"),
        "--ranks",
        "2",
        "--sizes",
        "64,1K",
        "--dtypes",
        "float32",
        "--rounds",
        "2",
    ]
    command += ["--rounds", "2", "--candidates", "custom_ar,gloo,impi", "--field", str(tmp_path / "empty"), "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=160)
    assert done.returncode == 0, done.stderr
    answer = json.loads(out.read_text())
    assert {(r["label"], r["pinned"], r["bytes"]) for r in answer["rows"]} >= {("custom_ar", True, 64), ("gloo", False, 1024)}
    assert all(len(r["medians"]) == len(r["means"]) == 2 and min(r["medians"] + r["means"]) > 0 for r in answer["rows"])
    assert "pip install" in answer["left_out"]["impi"]
    assert answer["machine"]["cpu"] in answer["machine"]["words"]
    assert [library["label"] for library in answer["libraries"]] == ["custom_ar", "gloo"]
    assert "| float32, times custom_ar | 64 B | 1 KiB |" in done.stdout


@pytest.mark.timeout(120)
def test_a_killed_rank_is_a_failure_of_its_candidate_and_close_leaves_no_process() -> None:
    setup = Setup(ranks=2, cores=2, folder=Path("/nonexistent"))
    group = Group(candidates("gloo", setup)[0], setup, max_bytes=64)
    try:
        assert [a["refusal"] for a in group.ask(do="prepare", dtype="float32", bytes=64)] == [None, None]
        os.kill(group.pids[1], signal.SIGKILL)
        with pytest.raises(GroupFailed):
            group.ask(do="turn", dtype="float32", bytes=64, calls=10, pinned=False)
    finally:
        group.close(force=True)
    assert not any(Path(f"/proc/{pid}").exists() for pid in group.pids)


def test_a_library_counts_at_its_best_setting() -> None:
    rows = [row("custom_ar", 2.0), row("impi", 9.0), row("impi", 3.0, label="impi I_MPI_THREAD_YIELD=2")]
    assert "| impi | 1.50 |" in ratios(rows, "float32")
    assert behind(rows) == []


def test_a_library_that_is_faster_only_by_the_mean_is_told() -> None:
    rows = [row("custom_ar", 2.0, mean=5.0), row("openmpi", 2.5, mean=4.0)]
    assert behind(rows) == ["openmpi at 64 B float32 by the mean: 4.00 us against 5.00 us"]
