"""Replicas of two ranks as processes, with real sync rounds: one rank is killed, and nobody is left believing in the room."""

from __future__ import annotations

import pytest
from disagg_group import rank_main

from commplane.testing import run_processes

pytestmark = [pytest.mark.timeout(180), pytest.mark.long]


def test_two_replicas_of_two_processes_move_a_page_and_agree() -> None:
    outcomes = run_processes(4, rank_main, -1, timeout=150)
    assert all(o.error is None for o in outcomes), [o.output for o in outcomes]
    for o in outcomes:
        assert [(r["room"], r["ok"]) for r in o.result["results"]] == [(1, True), (2, True)]
    assert [set(o.result["page"]) for o in outcomes[2:]] == [{"A"}, {"B"}]


@pytest.mark.parametrize("victim", [0, 1, 2, 3])
def test_a_killed_rank_ends_the_room_with_an_error_on_every_other_rank(victim: int) -> None:
    outcomes = run_processes(4, rank_main, victim, timeout=150)
    assert outcomes[victim].returncode == -9
    mate = victim ^ 1
    for o in outcomes:
        if o.rank == victim:
            continue
        assert o.error is None, o.output
        assert o.result["results"][0] == {"room": 1, "ok": True, "error": ""}
        if o.rank == mate:  # its round misses the killed rank
            assert o.result["kind"] == "PeerError" and f"rank {victim}" in o.result["error"], o.result
        else:
            (room,) = o.result["results"][1:]
            assert not room["ok"] and o.result["kind"] == "PeerError", o.result
