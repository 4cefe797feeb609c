"""The bench of sync rounds measures every candidate and ends its processes."""

from __future__ import annotations

import argparse
import json
import multiprocessing

import pytest

from commplane.errors import CommplaneError
from commplane_cache.bench import rounds

pytestmark = pytest.mark.timeout(90)


@pytest.mark.long
def test_a_short_run_has_every_figure_and_leaves_no_process() -> None:
    parser = argparse.ArgumentParser()
    rounds.add_arguments(parser)
    short = ["--ranks", "1", "2", "--passes", "1", "--calls", "3", "--steps", "1", "--work-ms", "0.5"]
    out = json.loads(json.dumps(rounds.run(parser.parse_args(short))))
    assert list(out["rounds"]["1"]) == ["round"]
    assert set(out["rounds"]["2"]) == {"round", "gloo all-reduce", "round, issued", "round over torch"}
    steps = {"no round", "pipelined", "blocking", "pipelined over torch"}
    assert {work: set(found) for work, found in out["steps"].items()} == {"torch": steps, "python": steps}
    figures = [f for part in ("rounds", "steps") for group in out[part].values() for f in group.values()]
    assert all(set(f) == {"median", "quietest", "cpu"} and min(f.values()) > 0 for f in figures)
    assert "a step of python work on 2 ranks takes" in rounds.table(out)
    assert multiprocessing.active_children() == []


def test_a_rank_that_fails_says_why() -> None:
    with pytest.raises(CommplaneError, match=r"rank 0 of 1: ValueError: .*fields must be named"):
        rounds.measure(ranks=[1], fields=0)
