"""A cache's decisions in the flight records: equal on ranks that agree, and where one decides alone the step is named."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from cache_group import Group

from commplane.testing import run_processes

pytestmark = pytest.mark.timeout(90)

STEPS = 8
ALONE = 5


def engine(store, rank, world_size, folder):
    """Three runs of a small engine: all ranks alike, and two in which rank 1 serves another prompt in step 5; their errors."""
    import numpy as np

    import commplane
    from commplane.errors import MismatchError
    from commplane_cache.agreed import cache_sync_spec
    from commplane_cache.cache import PrefixCache
    from commplane_cache.options import CacheOptions
    from commplane_cache.tree import TokenRun

    def run(name, *, alone, pipelined):
        settings = {"timeout": 20, "flight_dir": f"{folder}/{name}"}
        with commplane.init(store=store, rank=rank, world_size=world_size, config=settings) as plane:
            options = CacheOptions(page_tokens=4, pipelined=pipelined)
            cache = PrefixCache(plane.sync_round("cache", specs=[cache_sync_spec()]), 6, options=options)
            if pipelined:
                cache.step()  # the first only votes
            try:
                for step in range(1, STEPS):
                    cache.step()
                    prompt = [100 if alone and rank == 1 and step == ALONE else step] * 8
                    own = cache.allocate(2)
                    cache.insert(TokenRun(np.array(prompt), 4), own)
            except MismatchError as error:
                return str(error)
            plane.dump_flight_records("the run is over")
            return None

    return {
        "honest": run("honest", alone=False, pipelined=True),
        "blocking": run("blocking", alone=True, pipelined=False),
        "pipelined": run("pipelined", alone=True, pipelined=True),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of the dumps, and each rank's errors by run."""
    folder = tmp_path_factory.mktemp("flight")
    outcomes = run_processes(2, engine, str(folder))
    for one in outcomes:
        assert one.error is None and one.returncode == 0, one.output
    return folder, [one.result for one in outcomes]


def trace(folder):
    made = subprocess.run(
        [sys.executable, "-m", "commplane", "trace", str(folder), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert made.returncode in (0, 3), made.stderr
    return made.returncode, json.loads(made.stdout)


def test_ranks_that_agree_leave_equal_notes_and_nothing_is_wrong(runs):
    folder, errors = runs
    assert [e["honest"] for e in errors] == [None, None]
    code, found = trace(folder / "honest")
    assert (code, found["findings"]) == (0, [])
    (one,) = found["rounds"]
    first, second = one["places"]
    assert first["notes"] == second["notes"] > STEPS and first["last"] == second["last"]
    assert first["steps"] == STEPS - 1 and not first["failed"]
    assert [what for _, step, what in first["last"] if step == STEPS - 1 and what.startswith("new node")]


@pytest.mark.parametrize("kind", ["blocking", "pipelined"])
def test_the_step_in_which_a_rank_decides_alone_is_named(runs, kind):
    folder, errors = runs
    assert all("digest" in e[kind] for e in errors), errors
    code, found = trace(folder / kind)
    assert code == 3
    (finding,) = [f for f in found["findings"] if f["kind"] == "decided"]
    assert (finding["ranks"], finding["seq"], finding["group"]["name"]) == ([1], ALONE, "cache")
    assert f"rank 1 decided otherwise in step {ALONE}: 'new node " in finding["text"]
    assert " where rank 0: 'new node " in finding["text"]
    (one,) = found["rounds"]
    assert all(place["failed"] for place in one["places"])


def test_every_decision_is_noted_in_order_with_its_step():
    group = Group(3, device=4)
    for tokens in ([1, 1, 2, 2, 3, 3], [4, 4, 5, 5], [1, 1, 6, 6]):
        group.serve(tokens)
        group.step(2)
    noted = [group.rounds[i].notes.last() for i in range(3)]
    assert noted[0] == noted[1] == noted[2]
    said = group.caches[0].decisions()
    assert len(said) > 10
    assert [(n, step, text) for n, step, text in noted[0]] == [
        (d.number, d.step, " ".join([d.what, *map(str, d.numbers)])) for d in said
    ]
