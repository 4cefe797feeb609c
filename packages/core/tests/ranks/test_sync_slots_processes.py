"""Sync rounds inside one host on processes as ranks: thousands of them against an oracle, forks, and ranks that are killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import CommplaneError, CommunicatorError, PeerError
from commplane.testing import SimulatedRounds, run_processes, run_threads, shm_leftovers

pytestmark = pytest.mark.timeout(90)

SPEC = SyncSpec(
    name="c",
    api=(1, 0),
    fields=(
        SyncField("sum", Vote.SUM),
        SyncField("first", Vote.LEADER),
        SyncField("low", Vote.MIN, 20),
        SyncField("any", Vote.ANY),
    ),
)
SETTINGS = {"timeout": 30, "startup_timeout": 15}


def rounds(plane: Any, steps: int, seed: int) -> int:
    """Rounds of values, ways and pauses that are drawn; each is what `SimulatedRounds` says. How many were pipelined here."""
    rank, world_size = plane.rank, plane.world_size
    oracle = SimulatedRounds(world_size, [SPEC])
    drawn, own = random.Random(seed), random.Random(f"{seed}/{rank}")
    pipelined = 0
    with plane.sync_round("many", specs=[SPEC]) as votes:
        for step in range(steps):
            every: list[dict[str, Any]] = [
                {
                    "c.sum": drawn.randint(-(10**9), 10**9),
                    "c.first": drawn.getrandbits(62),
                    "c.low": [drawn.randint(-99, 99) for _ in range(20)],
                    "c.any": drawn.randrange(2),
                }
                for _ in range(world_size)
            ]
            for one, values in zip(oracle, every, strict=True):
                one.issue(values, digest=step)
            wanted = [dict(one.result()) for one in oracle][rank]
            if own.random() < 0.02:
                time.sleep(own.random() * 0.004)
            if own.random() < 0.3:
                found = votes.step(every[rank], digest=step)
            else:
                pipelined += 1
                votes.issue(every[rank], digest=step)
                if own.random() < 0.02:
                    time.sleep(own.random() * 0.004)
                found = votes.result()
            assert found == wanted, step
        assert votes.steps == steps
    return pipelined


def many(store: Any, rank: int, world_size: int, steps: int) -> dict[str, Any]:
    import commplane

    with commplane.init(store=store, rank=rank, world_size=world_size, config=SETTINGS) as plane:
        pipelined = rounds(plane, steps, world_size)
        return {"pipelined": pipelined, "threads": [t.name for t in threading.enumerate()]}


@pytest.mark.parametrize(("world_size", "steps"), [(2, 2000), pytest.param(4, 1000, marks=pytest.mark.long)])
def test_thousands_of_rounds_agree_on_what_simulated_ones_do_whichever_way_each_rank_goes(world_size: int, steps: int) -> None:
    for o in run_processes(world_size, many, steps):
        assert o.error is None, o.output
        assert steps / 2 < o.result["pipelined"] < steps
        assert not [name for name in o.result["threads"] if name.startswith("commplane sync")]
    assert not shm_leftovers()


def test_threads_as_ranks_agree_on_what_simulated_rounds_do() -> None:
    out = run_threads(3, lambda plane: rounds(plane, 1000, 3), config=lambda _rank: SETTINGS)
    assert all(isinstance(o, int) and o > 500 for o in out), out


def one_is_lost(store: Any, rank: int, world_size: int, how: str, deadline: float) -> dict[str, Any]:
    """Some rounds, the last of which rank 1 does not come to."""
    import commplane

    with commplane.init(store=store, rank=rank, world_size=world_size, config=SETTINGS) as plane:
        votes = plane.sync_round("x", specs=[SPEC], timeout=deadline)
        values = {"c.sum": 1, "c.first": 1, "c.low": [1] * 20, "c.any": 1}
        for _ in range(3):
            votes.issue(values)
            votes.result()
        if rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(deadline + 1)
            votes._close(wait=False)
            return {}
        votes.issue(values)
        began = time.monotonic()
        try:
            votes.result()
        except PeerError as error:
            took = time.monotonic() - began
            with pytest.raises(PeerError, match="poisoned"):
                votes.issue(values)
            votes._close(wait=False)
            return {"missing": list(error.missing_ranks), "text": str(error), "took": took}
        return {}


@pytest.mark.parametrize(
    ("how", "deadline", "within", "why"),
    [("killed", 60, 20, "has ended"), pytest.param("absent", 1.5, 15, "waited 1.125 s for rank 1", marks=pytest.mark.long)],
)
def test_a_rank_that_is_lost_is_named_on_all_others(how: str, deadline: float, within: float, why: str, tmp_path: Path) -> None:
    """`within`: seconds; the rest is what a machine with something else to do may take. One that is killed is noticed early."""
    env = {"COMMPLANE_FLIGHT_DIR": str(tmp_path)}
    for o in run_processes(4, one_is_lost, how, deadline, env=lambda _rank: env):
        if o.rank == 1:
            assert o.returncode == -signal.SIGKILL if how == "killed" else o.error is None, o.output
            continue
        assert o.error is None, o.output
        assert o.result["missing"] == [1] and "sync round, step 4: rank 1 did not take part" in o.result["text"]
        assert why in o.result["text"] and o.result["took"] < within
    assert not shm_leftovers()


def killed_while_mapping(store: Any, rank: int, world_size: int, where: str) -> str:
    """Rank 0 is killed when the segment has a name."""
    import commplane
    from commplane.runtime.sync import segment

    real = getattr(segment, where)

    def then_die(name: str, nbytes: int) -> Any:
        real(name, nbytes)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        setattr(segment, where, then_die)
    with commplane.init(store=store, rank=rank, world_size=world_size, config=SETTINGS) as plane:
        try:
            plane.sync_round("x", specs=[SPEC])
        except CommplaneError as error:
            return f"{type(error).__name__}: {error}"
    return "formed"


@pytest.mark.parametrize("where", ["_create", pytest.param("_map", marks=pytest.mark.long)])
def test_a_leader_that_is_killed_while_the_ranks_map_leaves_no_name(where: str, tmp_path: Path) -> None:
    env = {"COMMPLANE_FLIGHT_DIR": str(tmp_path)}
    killed, *others = run_processes(3, killed_while_mapping, where, env=lambda _rank: env)
    assert killed.returncode == -signal.SIGKILL
    for o in others:
        assert o.error is None, o.output
        assert o.result.startswith("PeerError") and "rank 0" in o.result
    assert not shm_leftovers()


def forks(store: Any, rank: int, world_size: int) -> int:
    """A child tries to use and to close the round; its parent goes on."""
    import commplane

    with commplane.init(store=store, rank=rank, world_size=world_size, config=SETTINGS) as plane:
        votes = plane.sync_round("x", specs=[SPEC])
        values = {"c.sum": 1, "c.first": 1, "c.low": [1] * 20, "c.any": 1}
        votes.issue(values)
        child = os.fork()
        if child == 0:
            code = 0
            for call in (votes.result, lambda: votes.issue(values), lambda: votes.step(values)):
                try:
                    call()
                except CommunicatorError as error:
                    code += "belongs to the parent process" in str(error)
            votes.close()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert votes.result()["c.sum"] == world_size
        votes.issue(values)
        assert votes.result()["c.sum"] == world_size
        return code


def test_a_forked_child_can_neither_use_nor_end_the_slots_of_its_parent() -> None:
    for o in run_processes(2, forks):
        assert o.error is None, o.output
        assert o.result == 3


def threads_of_a_round(store: Any, rank: int, world_size: int) -> list[str]:
    import commplane

    with commplane.init(store=store, rank=rank, world_size=world_size, config=SETTINGS) as plane:
        votes = plane.sync_round("x", specs=[SPEC])
        votes.issue({"c.sum": 1, "c.first": 1, "c.low": [1] * 20, "c.any": 1})
        names = [t.name for t in threading.enumerate()]
        assert votes.result()["c.sum"] == world_size
        return [name for name in names if name.startswith("commplane sync")]


@pytest.mark.parametrize("hosts", ["aab", pytest.param("ab", marks=pytest.mark.long)])
def test_a_round_over_two_hosts_goes_by_its_threads(hosts: str) -> None:
    for o in run_processes(len(hosts), threads_of_a_round, env=lambda rank: {"COMMPLANE_HOST_ALIAS": hosts[rank]}):
        assert o.error is None, o.output
        assert sorted(o.result) == ["commplane sync roll call", "commplane sync x"]
