"""The adapter in an engine with SGLang's seams, on real processes: from the entry point to the last group destroyed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from sglang_job import HIDDEN, TOKENS, halves, refused, serve

from commplane.testing import run_processes, shm_leftovers

STANDIN = Path(__file__).parent / "sglang_standin"


@pytest.fixture(autouse=True)
def flight_records(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path_factory.mktemp("flight")))


def on(engine=STANDIN):
    path = os.pathsep.join(filter(None, [str(engine), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path, "SGLANG_PLUGINS": "commplane", "COMMPLANE_TIMEOUT": "30"}


def results(outcomes):
    assert all(o.returncode == 0 for o in outcomes), "\n".join(f"{o.error}: {o.message}\n{o.output[-3000:]}" for o in outcomes)
    return [o.result for o in outcomes]


@pytest.mark.timeout(120)
def test_the_engine_decodes_the_same_tokens_through_the_plan():
    before = shm_leftovers()
    for without, *lives in results(run_processes(2, serve, env=lambda _: on())):
        assert len(set(without["tokens"])) > 3 and without["calls"]["own"] > 50
        for life in lives:
            assert life["tokens"] == life["captured"] == without["tokens"]
            assert life["halves"] == [2.0] * 3 and life["kept"] == [True] * 4
            assert life["plan"] == "custom_ar" and life["ours"] == [True, True, False]
            assert life["prepared"] == [["all_reduce", TOKENS * HIDDEN * 4]]
            assert "inside a capture" in life["refused"]  # the plane captured, too
            # The engine captured and prepared as before, and summed only what no backend of ours has: complex64.
            assert [life["calls"][k] for k in ("graph_capture", "pre_initialize", "own")] == [2, 1, 1]
            assert life["closed"] and not life["world"]
    assert shm_leftovers() <= before


@pytest.mark.long
@pytest.mark.timeout(120)
def test_groups_of_one_kind_work_side_by_side():
    before = shm_leftovers()
    outcomes = results(run_processes(4, halves, env=lambda _: on()))
    assert outcomes == [[[0, 1], True, 1.0]] * 2 + [[[2, 3], True, 5.0]] * 2
    assert shm_leftovers() <= before


def renamed(tmp_path):
    """The stand-in as an engine in which a method that the adapter hooks has another name."""
    engine = tmp_path / "engine"
    shutil.copytree(STANDIN, engine, ignore=shutil.ignore_patterns("__pycache__"))
    state = engine / "sglang" / "srt" / "distributed" / "parallel_state.py"
    state.write_text(state.read_text().replace("_all_reduce_in_place", "_reduce_in_place"))
    return engine


@pytest.mark.timeout(120)
def test_a_rank_without_the_adapter_is_named_and_a_refusal_is_everybodys(tmp_path):
    engines = [STANDIN, renamed(tmp_path)]
    ranks = results(run_processes(2, refused, env=lambda r: on(engines[r])))
    (absent, refusal), (started, same) = ranks
    assert started == "started"
    assert absent.startswith(
        "PeerError: [commplane-sglang rank 0/2] vote: wanted the adapter on all 2 ranks, found no answer from rank 1"
    )
    assert "install commplane-sglang for every rank" in absent
    assert refusal.replace("rank 0/2", "rank 1/2") == same
    assert refusal.startswith("AgreementError: [commplane-sglang rank 0/2] vote: ")
    assert (
        "rank 1: commplane-sglang 0.1.0 does not touch sglang: wanted GroupCoordinator._all_reduce_in_place(self, input_)"
        in refusal
    )
    assert "found nothing of that name" in refusal and "rank 0: commplane-sglang 0.1.0 for sglang 0.5.23" in refusal
