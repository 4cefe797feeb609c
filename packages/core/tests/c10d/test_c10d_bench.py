"""``commplane bench --c10d``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commplane.bench.c10d import C10D_CALLS, C10dRow, c10d_table
from commplane.bench.overhead import Spread


def row(call: str, ns: float, size: int = 64) -> C10dRow:
    spread = Spread(ns, ns, ns)
    more = Spread(ns - 600, ns - 600, ns - 600)
    return C10dRow(call, False, "float32", size, 2, "cpu", "gloo", ("custom_ar", "torch"), spread, more, 400_000 / ns)


def test_the_table_says_what_a_call_costs_more_and_how_many_times_gloo_it_is() -> None:
    times = {
        "communicator": 600,
        "all_reduce": 4000,
        "async": 5000,
        "functional": 60_000,
        "torch": 400_000,
        "torch functional": 4e5,
    }
    text = c10d_table([row(call, ns) for call, ns in times.items()])
    assert list(times) == list(C10D_CALLS)
    assert "4.00 (+3.4, 100x)" in text and "dist.all_reduce(x) over gloo" in text and "custom_ar+torch" in text


@pytest.mark.long
@pytest.mark.timeout(180)
def test_the_command_measures_all_calls_and_writes_them(tmp_path: Path) -> None:
    command = ["bench", "--c10d", "--sizes", "64,64K", "--rounds", "1", "--pin", "off", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, "-m", "commplane", *command], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(r["bytes"], r["call"]) for r in rows] == [(size, call) for size in (64, 65536) for call in C10D_CALLS]
    assert "dist.all_reduce(x) over gloo" in done.stdout


def test_what_the_command_does_not_measure_is_refused() -> None:
    command = ["bench", "--c10d", "--op", "max", "--overhead"]
    done = subprocess.run([sys.executable, "-m", "commplane", *command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0 and "found --overhead, --op" in done.stderr
