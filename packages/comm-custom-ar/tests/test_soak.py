"""The soak for a short while, and that it would notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from car_forks import Server

from commplane.api import owned_name
from commplane.api.shm import SHM_DIRECTORY
from commplane.testing import Outcome

SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments() -> None:
    out = subprocess.run([sys.executable, str(SOAK), "--kills", "20"], capture_output=True, text=True, check=False)
    assert out.returncode == 0 and "0 iterations failed" in out.stdout, out.stdout + out.stderr


GOOD = {
    "error": "PeerError",
    "missing": [1],
    "text": "[tp rank 0/3 custom_ar] all_reduce(sum, float32, count=9) number 7: the process of rank 1 has ended",
    "phase": "call",
    "again": {"error": "PeerError", "missing": [1], "text": "[tp rank 0/3] is poisoned by an earlier fault"},
    "closed": True,
    "calls": 3,
}
FINISHED = {"error": None, "again": None, "closed": True, "calls": 3}
PLAN = {"victims": [1], "world_size": 3}


def verdict(said: dict[str, Any] | None, code: int | None = 0, moment: str = "call") -> str | None:
    from soak import judge

    return judge(PLAN, Outcome(0, code, said, None, "", ""), Counter([moment]))


def test_what_a_survivor_may_say_is_let_through() -> None:
    assert verdict(GOOD) is None
    assert verdict(FINISHED, moment="close") is None
    creation = {**GOOD, "error": "PeerFailed", "missing": None, "phase": "communicator", "again": None}
    assert verdict({**creation, "text": "[tp rank 0/3] agreement: rank 2: rank 1 has ended"}) is None


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"missing": [2]}, "blames"),
        ({"missing": [1, 2]}, "blames"),
        ({"missing": []}, "blames"),
        ({"error": "CommunicatorError"}, "another error"),
        ({"error": "AgreementError", "text": "rank 2: something"}, "does not name the killed"),
        ({"text": "rank 1 is gone"}, "does not name operation and number"),
        ({"again": {}}, "a later call"),
        ({"again": {"error": "PeerError", "text": "waited 30 s"}}, "a later call"),
        ({"closed": False}, "close did not work"),
        ({"wrong": "call 3"}, "a wrong result"),
    ],
)
def test_what_a_survivor_may_not_say_is_found(change: dict[str, Any], found: str) -> None:
    assert found in (verdict({**GOOD, **change}) or "")


def test_a_survivor_that_does_not_end_or_ends_too_well_is_found() -> None:
    assert "had not ended" in (verdict(None, code=None) or "")
    assert "exit status -11" in (verdict(None, code=-signal.SIGSEGV) or "")
    assert "finished without them" in (verdict(FINISHED) or "")


def names_something(store: Any, rank: int, world_size: int) -> list[Any]:
    name = owned_name("car")
    (SHM_DIRECTORY / name).write_bytes(b"x")
    return [os.getpid(), name]


def test_names_that_a_survivor_left_are_found_and_those_of_a_killed_rank_are_counted(forks: Server) -> None:
    from soak import Tally, names_left

    (outcome,) = forks.run(1, names_something)
    pid, name = outcome.result
    tally = Tally()
    assert any(name in problem for problem in names_left([pid], [], tally)) and tally.left_for_next_start == 1
    (outcome,) = forks.run(1, names_something)
    pid, name = outcome.result
    assert names_left([pid], [pid], tally) == [] and tally.left_for_next_start == 2
    assert not (SHM_DIRECTORY / name).exists()
