"""The bench of decoding with a model of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BENCH = str(ROOT / "packages" / "core" / "benchmarks" / "llama_decode.py")


def test_a_size_that_the_bench_has_not_is_refused() -> None:
    done = subprocess.run([sys.executable, BENCH, "--models", "15M,7B"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "--models: wanted some of 15M" in done.stderr and "found 7B" in done.stderr


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.skipif(find_spec("transformers") is None, reason="wants transformers: pip install transformers")
def test_the_bench_has_the_same_tokens_over_both_backends_and_writes_a_row_for_each_way(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, BENCH, "--models", "15M", "--tokens", "5", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert [row["way"] for row in found["rows"]] == ["whole", "gloo", "commplane"]
    assert all(row["tokens_per_s"]["low"] > 0 for row in found["rows"])
    assert "2 ranks over commplane" in done.stdout and found["machine"]["ranks"] == 2
