"""The adapter in an engine with vLLM's seams, on real processes: from the entry point to the last group destroyed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vllm_job import HIDDEN, TOKENS, serve

from commplane.testing import run_processes, shm_leftovers

STANDIN = Path(__file__).parent / "vllm_standin"


@pytest.fixture(autouse=True)
def flight_records(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path_factory.mktemp("flight")))


@pytest.mark.timeout(120)
def test_the_engine_decodes_the_same_tokens_through_the_plan():
    before = shm_leftovers()
    path = os.pathsep.join(filter(None, [str(STANDIN), os.environ.get("PYTHONPATH", "")]))
    env = {"PYTHONPATH": path, "VLLM_PLUGINS": "commplane", "COMMPLANE_TIMEOUT": "30"}
    outcomes = run_processes(2, serve, env=lambda _: env)
    assert all(o.returncode == 0 for o in outcomes), "\n".join(f"{o.error}: {o.message}\n{o.output[-3000:]}" for o in outcomes)
    for without, ours in (o.result for o in outcomes):
        assert len(set(without["tokens"])) > 3 and without["calls"]["own"] >= 50
        assert ours["tokens"] == ours["captured"] == without["tokens"]
        assert ours["plan"] == "custom_ar" and ours["closed"] and ours["standin"]
        assert ours["kept"] == [10.0, 5.0] and ours["halves"] == [2.0] * 3
        assert ours["prepared"] == [["all_reduce", TOKENS * HIDDEN * 4]]
        assert "inside a capture" in ours["refused"]  # the plane captured, too
        # The engine captured and destroyed as before, and summed only what no backend of ours has: complex64.
        assert [ours["calls"][k] for k in ("graph_capture", "own")] == [2, 1]
    assert shm_leftovers() <= before
