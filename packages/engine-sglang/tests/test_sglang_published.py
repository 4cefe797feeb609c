"""The adapter against the published SGLang: its source, its plugin loader and its groups on CPU. Run by `nox -s engines`.

What the modules of its groups import has to be there too: the dependency group `published-imports`.
"""

from __future__ import annotations

import pytest
from sglang_job import published

from commplane.testing import run_processes, shm_leftovers
from commplane_sglang.seams import ENGINE

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(240),
    pytest.mark.skipif(ENGINE.version is None, reason="wants sglang: pip install --no-deps 'sglang>=0.5.21,<0.5.24'"),
]


def test_the_installed_version_is_one_that_the_adapter_knows():
    assert ENGINE.problem() is None


def test_the_engines_own_groups_decode_through_the_plan(monkeypatch, tmp_path):
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path))
    before = shm_leftovers()
    env = {"SGLANG_PLUGINS": "commplane", "COMMPLANE_TIMEOUT": "60"}
    outcomes = run_processes(2, published, env=lambda _: env, timeout=200)
    assert all(o.returncode == 0 for o in outcomes), "\n".join(f"{o.error}: {o.message}\n{o.output[-3000:]}" for o in outcomes)
    for o in outcomes:
        assert "sglang_standin" not in o.result["file"]
        assert o.result["backends"][0] == "custom_ar" and o.result["closed"]
        assert o.result["tokens"] == o.result["captured"] == o.result["alone"] and len(set(o.result["tokens"])) > 3
        assert o.result["kept"] == [True] * 4 and o.result["compiled"] == [5.0] * 3
    assert shm_leftovers() <= before
