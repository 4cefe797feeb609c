"""Start-up of many ranks: what a round sends, who looks after late ones, and the measurement of it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from commplane import cli, errors
from commplane.agree import Activity, BoundedStore, CaptureGuard, StoreBootstrap
from commplane.agree.watch import Watch
from commplane.api import Facts, ProbeRequest, Unusable, Usable, Verdict
from commplane.bench import startup_table
from commplane.bench.counted import CountedStore
from commplane.bench.startup import StartupRow, growth
from commplane.bench.virtual import IDLE, IdleHost
from commplane.runtime import Plane
from commplane.testing import run_threads

LIMIT_S = 120


def rounds(world_size: int, count: int) -> list[CountedStore]:
    """What each rank sent in `count` rounds."""
    shared = HashStore()
    clients = [CountedStore(shared) for _ in range(world_size)]
    heard: list[list[Any]] = [[] for _ in clients]

    def rank_main(rank: int) -> None:
        store = BoundedStore(clients[rank], LIMIT_S)
        control = StoreBootstrap(
            store,
            range(world_size),
            rank,
            prefix="p",
            timeout=LIMIT_S,
            who=f"[rank {rank}]",
            guard=CaptureGuard(),
            activity=Activity(store, rank, "notes"),
        )
        for i in range(count):
            heard[rank] += control.all_gather([rank, i], what="a round")

    threads = [threading.Thread(target=rank_main, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert heard == [[[r, i] for i in range(count) for r in range(world_size)]] * world_size
    return clients


@pytest.mark.parametrize("world_size", [2, 32, 200])
def test_a_round_is_one_message_a_rank_and_one_decision_beside_the_looks_of_those_that_wait(world_size: int) -> None:
    clients = rounds(world_size, 3)
    kinds = [{kind: c.calls for kind, c in client.calls.items()} for client in clients]
    assert all(found.get("append") == 3 for found in kinds)
    assert [client.decided for client in clients] == [3] + [0] * (world_size - 1)
    assert all(found.keys() <= {"append", "compare_set", "delete_key", "set"} for found in kinds)
    assert all("delete_key" not in found for found in kinds[1:])
    assert kinds[0]["delete_key"] <= 3 * 2  # of the two rounds before the last


def test_of_many_ranks_that_wait_one_looks_for_all_and_another_when_it_stops() -> None:
    store = BoundedStore(HashStore(), LIMIT_S)
    watches = [Watch(store, "watch", r, range(100)) for r in range(100)]
    for _ in range(3):
        assert [r for r, watch in enumerate(watches) if watch.my_turn()] == [0]
    # Rank 0 is gone: what it left is new to nobody now, and the first to see that takes over.
    assert [r for r in range(1, 100) if watches[r].my_turn()] == [1]
    assert [r for r in range(1, 100) if watches[r].my_turn()] == [1]


def test_few_ranks_each_look_for_themselves() -> None:
    store = BoundedStore(HashStore(), LIMIT_S)
    watches = [Watch(store, "watch", r, range(4)) for r in range(4)]
    assert all(watch.my_turn() for watch in watches)


def test_a_rank_that_is_here_is_asked_about_a_late_one_that_forms_something_else_with_it() -> None:
    store = BoundedStore(HashStore(), LIMIT_S)
    ranks = range(100, 200)
    looks, other, unconcerned = (Watch(store, "watch", r, ranks) for r in (0, 7, 8))
    assert looks.my_turn()
    note = {"text": "", "gone": False, "forming": {"key": "k", "instance": 1, "runs": [[107, 107], [150, 150]], "decision": "d"}}
    looks.ask([50, 51], {50: note, 51: note})
    assert not other.my_turn() and other.asked() == [50]
    assert not unconcerned.my_turn() and unconcerned.asked() == []


REFUSES = 77


def probe_of_one(request: ProbeRequest, facts: Facts) -> Verdict:
    return Unusable("no such device") if request.rank == REFUSES else Usable()


def test_two_hundred_ranks_hold_the_same_plan_and_the_same_facts() -> None:
    def rank_main(plane: Plane) -> tuple[str, int]:
        return plane.communicator("tp").plan.digest, len(plane.facts)

    out = run_threads(200, rank_main, plugins=lambda _rank: IdleHost(), timeout=LIMIT_S)
    assert not [r for r in out if isinstance(r, Exception)]
    assert len(set(out)) == 1 and out[0][1] == 200  # type: ignore[index]


def test_the_reason_of_one_rank_of_a_hundred_is_shown_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commplane.bench.virtual.probe", probe_of_one)

    def rank_main(plane: Plane) -> None:
        plane.communicator("tp")

    for error in run_threads(100, rank_main, plugins=lambda _rank: IdleHost(), timeout=LIMIT_S):
        assert isinstance(error, errors.SelectionError), error
        assert f"{IDLE} (probe): rank {REFUSES}: no such device" in str(error)


def test_the_command_counts_what_each_step_sends_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "startup.json"
    arguments = ["bench", "--startup", "--startup-ranks", "4,2", "--rounds", "1", "--quiet", "--json", str(out)]
    assert cli.main(arguments) == 0
    written = json.loads(out.read_text())
    assert written["machine"]["command"].startswith("commplane bench --startup") and written["machine"]["ranks"] == 4
    rows = [StartupRow(**r) for r in written["rows"]]
    assert [(r.ranks, r.step, r.rounds) for r in rows] == [
        (n, step, count)
        for n in (2, 4)
        for step, count in (("round", 1), ("gather", 1), ("agree", 1), ("init", 4), ("communicator", 4))
    ]
    for r in rows:
        assert 0 < r.low <= r.seconds <= r.high and r.store_alone > 0 and r.runs == 1
        # A rank adds its record and looks at least once, in every round.
        assert r.messages >= 2 * r.ranks * r.rounds and r.sent > 0 and r.received > 0
    said = capsys.readouterr().out
    assert startup_table(rows) in said
    assert "Plane.communicator: seconds grow as ranks^" in said


def row(ranks: int, seconds: float) -> StartupRow:
    return StartupRow("round", ranks, 2, seconds, seconds, seconds, 0.0, 1, 1, 1, 1.0, 1, 1, seconds)


@pytest.mark.parametrize(("power", "wanted"), [(1, 1.0), (2, 2.0), (0, 0.0)])
def test_the_growth_is_the_power_of_the_ranks(power: int, wanted: float) -> None:
    assert growth([row(n, 0.001 * n**power) for n in (8, 64, 512)], "round") == pytest.approx(wanted)


def test_one_size_has_no_growth() -> None:
    assert growth([row(8, 1.0)], "round") is None


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--startup", "--sizes", "64"], "measures the control plane alone, found --sizes"),
        (["--startup", "--overhead"], "found --overhead"),
        (["--startup-ranks", "8"], "--startup-ranks is for --startup"),
    ],
)
def test_options_that_startup_has_no_use_for_are_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 1
    assert text in capsys.readouterr().err
