"""The clauses of the quantised norm: each wrong backend fails the test that is meant for it, and honest ones pass them all."""

from __future__ import annotations

import re

import pytest
from kit_run import Kit
from test_meta import node, ranks
from wrong_fused import CAUGHT_BY

# One of each kind; each starts the kit, which takes 2 to 4 s.
QUICK = {"ScaleInverted", "GroupScalesRowMajor", "StaleScales"}


def test_each_is_caught_by_a_test_of_its_own() -> None:
    assert len(CAUGHT_BY) >= 20
    assert len(set(CAUGHT_BY.values())) == len(CAUGHT_BY)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in CAUGHT_BY])
def test_a_wrong_quantised_norm_fails_the_test_that_is_meant_for_it(kit: Kit, name: str) -> None:
    argument, test = node(CAUGHT_BY[name])
    run = kit(f"fused_plugins:{name}", "--commplane-ranks", ranks(test), tests=(argument,))
    assert run.code == 1 and run.outcome(test) == "failed", run.output
    assert "failed in the start of the ranks" not in run.output
    assert re.search(r"docs/semantics\.md, S\d+", run.output)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("plugin", ["Honest", "HonestInTwo"])
def test_an_honest_quantised_norm_passes_all(kit: Kit, plugin: str) -> None:
    for size in ("2", "3", "4"):
        run = kit(f"fused_plugins:{plugin}", "--commplane-ranks", size, tests=("commplane_conformance.comm.test_fused_quant",))
        assert run.code == 0, run.output
