"""Groups of an engine on real processes, over several lives of them: who sums what, and what ranks that differ are told."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from engines_rank import lives, lost, mishaps

from commplane.testing import run_processes, shm_leftovers

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        find_spec("commplane_custom_ar") is None, reason="wants commplane-custom-ar: pip install commplane-custom-ar"
    ),
]


@pytest.fixture(autouse=True)
def flight_records(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path_factory.mktemp("flight")))


def results(outcomes):
    assert all(o.returncode == 0 for o in outcomes), "\n".join(f"{o.error}: {o.message}\n{o.output[-3000:]}" for o in outcomes)
    return [o.result for o in outcomes]


def test_groups_are_served_dropped_and_made_again_alike_on_all_ranks():
    before = shm_leftovers()
    ranks = results(run_processes(2, lives, env=lambda _: {"COMMPLANE_TIMEOUT": "30"}))
    for out in ranks:
        assert out["served"] == [False, True, False]
        assert set(out["sums"].values()) == {"ours", "theirs"}
        assert all(out["sums"][k] == "ours" for k in ("plain", "transposed", "channels last", "every other column", "nothing"))
        assert all(out["sums"][k] == "ours" for k in ("one number", "offset", "torch.bfloat16"))
        assert out["sums"]["torch.complex64"] == out["sums"]["torch.bool"] == "theirs"
        assert out["inference"] == [2.0] * 3
        assert out["after a drop"] == [True, 2.0]
        assert out["without the first"] == [True, None, True, True]
        assert out["again"] == [True, True, 2.0]
        assert out["a new default group"] == [True, 2.0, None, True]
    assert ranks[0]["sums"] == ranks[1]["sums"]
    assert shm_leftovers() <= before


def test_ranks_that_differ_are_told_so_and_none_is_left_waiting():
    before = shm_leftovers()
    ranks = results(run_processes(2, mishaps, env=lambda _: {"COMMPLANE_TIMEOUT": "10"}))
    for out in ranks:
        assert out["another order"].startswith("AgreementError: ") and "every rank must create the same" in out["another order"]
        text = out["another order"].replace("forms communicator", "forms")  # the first one is said in full
        assert "rank 0 forms 'tp:0'" in text and "rank 1 forms 'ep:0'" in text
        assert not out["capturing"] and out["plane"]
    assert [out["failed in a capture"] for out in ranks] == ["PeerError", "ZeroDivisionError"]
    assert [out["after it"] for out in ranks] == ["PeerError", "CaptureError"]  # nobody waits, or gets a sum of one rank
    assert shm_leftovers() <= before


@pytest.mark.long
def test_a_rank_that_was_killed_leaves_nobody_waiting_and_nothing_behind():
    before = shm_leftovers()
    first, second = run_processes(2, lost, env=lambda _: {"COMMPLANE_TIMEOUT": "5"})
    assert second.returncode == -9
    assert first.returncode == 0 and first.result == ["PeerError", True, True], first.output[-3000:]
    assert shm_leftovers() <= before
