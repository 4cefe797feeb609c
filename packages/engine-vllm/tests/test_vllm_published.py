"""The adapter against the published vLLM: its source, its plugin loader and its groups on CPU. Run by `nox -s engines`.

What the modules of its groups import has to be there too: the dependency group `published-imports`.
"""

from __future__ import annotations

import pytest
from vllm_job import HIDDEN, TOKENS, serve

from commplane.testing import run_processes, shm_leftovers
from commplane_vllm.seams import ENGINE

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(240),
    pytest.mark.skipif(ENGINE.version is None, reason="wants vllm: pip install --no-deps 'vllm>=0.32,<0.34'"),
]


def test_the_installed_version_is_one_that_the_adapter_knows():
    assert ENGINE.problem() is None


def test_the_engines_own_groups_decode_through_the_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path))
    before = shm_leftovers()
    env = {"VLLM_PLUGINS": "commplane", "COMMPLANE_TIMEOUT": "60"}
    outcomes = run_processes(2, serve, env=lambda _: env, timeout=200)
    assert all(o.returncode == 0 for o in outcomes), "\n".join(f"{o.error}: {o.message}\n{o.output[-3000:]}" for o in outcomes)
    for without, ours in (o.result for o in outcomes):
        assert not ours["standin"] and ours["plan"] == "custom_ar" and ours["closed"]
        assert ours["tokens"] == ours["captured"] == without["tokens"] and len(set(ours["tokens"])) > 3
        assert ours["halves"] == without["halves"] == [2.0] * 3
        assert ours["kept"] == [10.0, 5.0] and ours["compiled"] == [5.0] * 3
        assert ours["prepared"] == [["all_reduce", TOKENS * HIDDEN * 4]]
    assert shm_leftovers() <= before
