"""The kit finds what it is there to find: each wrong backend fails the test that is meant for it, and an honest one passes it."""

from __future__ import annotations

import os
import re

import pytest
from kit_run import Kit
from wrong import CAUGHT_BY

FULL = os.environ.get("COMMPLANE_CONFORMANCE_FULL") == "1"

PLUGINS = {
    "wrong_api": "life::test_the_api_number_is_a_literal",
    "wrong_torch": "life::test_what_is_declared_loads_no_torch",
    "wrong_probe": "life::test_the_canary_finds_nothing[2-ranks]",
}
ALL = {**{f"wrong_plugins:{name}": test for name, test in CAUGHT_BY.items()}, **PLUGINS}


def node(test: str) -> tuple[str, str]:
    """The argument for pytest, and the id in the kit."""
    module, _, name = test.partition("::")
    return f"commplane_conformance.comm.test_{module}::{name}", f"{module}.py::{name}"


def ranks(test: str) -> str:
    """The size of the group that a test runs with."""
    found = re.search(r"(\d)-ranks", test)
    return found[1] if found else "2"


def test_there_are_more_than_twenty_and_each_is_caught_by_a_test_of_its_own() -> None:
    assert len(ALL) >= 20
    assert len(set(ALL.values())) == len(ALL)


# Their tests wait for deadlines, which takes 10 to 25 s each.
WAITS = {"MeetsElsewhere", "UnboundedWait", "LeaksAnotherName", "GivesUpEarly", "LeaksAThread", "HoldsTheLock"}
# Theirs take 4 to 10 s each.
SLOW = {"ReturnsWithoutASource", "LeaksASegment", "ScattersInARing", "ReturnsWithoutPeers", "Races"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "plugin", [pytest.param(name, marks=[pytest.mark.long] * (name.partition(":")[2] in WAITS | SLOW)) for name in ALL]
)
def test_a_wrong_backend_fails_the_test_that_is_meant_for_it(kit: Kit, plugin: str) -> None:
    argument, name = node(ALL[plugin])
    run = kit(plugin, "--commplane-ranks", ranks(name), tests=(argument,))
    assert run.code == 1 and run.outcome(name) == "failed", run.output
    # One that cannot even be opened fails every test, and proves none of them: only a probe that refuses is wrong in just that.
    assert ("failed in the start of the ranks" in run.output) == (plugin == "wrong_probe"), run.output
    assert re.search(r"docs/semantics\.md, S\d+", run.output)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_honest_backend_passes_all_of_these(kit: Kit) -> None:
    for size in ("2", "3", "4"):
        names = [node(test) for test in ALL.values() if ranks(test) == size]
        run = kit("wrong_plugins:Honest", "--commplane-ranks", size, tests=tuple(argument for argument, _ in names))
        assert run.code == 0, run.output
        assert {run.outcome(name) for _, name in names} == {"passed"}


@pytest.mark.timeout(900)
@pytest.mark.skipif(not FULL, reason="all of the kit on an honest backend: nox -s meta -- --full")
def test_an_honest_backend_passes_the_kit(kit: Kit) -> None:
    run = kit("wrong_plugins:Honest", "--commplane-full")
    assert run.code == 0, run.output
    assert run.report["unexercised"] == []
