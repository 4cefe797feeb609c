"""Ranks that are killed, stopped, absent or late: every wait ends, and says who was missing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from commplane import errors
from commplane.api import Capability
from commplane.runtime import Communicator
from commplane_conformance.marks import at_least, clause, needs, needs_dtype
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import Outcome, World, Worlds

pytestmark = [needs(Capability.ALL_REDUCE), needs_dtype("float32")]

# What a backend may wait for a peer in a collective, and how long the kit waits for the backend: far more, for a loaded machine.
_WAIT_S = 3.0
_LIMIT_S = 20.0
_CONFIG = {"run_timeout": _WAIT_S, "startup_timeout": 15.0}

_CALLS: dict[str, tuple[Capability, Callable[[Rank, Communicator], object]]] = {
    "all_reduce": (Capability.ALL_REDUCE, lambda rank, comm: comm.all_reduce_(torch.ones(1000, device=rank.device))),
    "large all_reduce": (Capability.ALL_REDUCE, lambda rank, comm: comm.all_reduce_(torch.ones(2_000_000, device=rank.device))),
    "all_gather": (Capability.ALL_GATHER, lambda rank, comm: comm.all_gather(torch.ones(1000, device=rank.device))),
    "reduce_scatter": (
        Capability.REDUCE_SCATTER,
        lambda rank, comm: comm.reduce_scatter(torch.ones(64 * rank.world_size, device=rank.device)),
    ),
    # The victim is always the last rank.
    "broadcast": (
        Capability.BROADCAST,
        lambda rank, comm: comm.broadcast(torch.ones(1000, device=rank.device), comm.world_size - 1),
    ),
    "barrier": (Capability.BARRIER, lambda rank, comm: comm.barrier()),
}


def told(rank: Rank, comm: Communicator, what: str, victim: int) -> dict[str, object]:
    """What a call without the victim ends with, and the call after it."""
    said: dict[str, object] = {}
    for step in ("first", "second"):
        began = time.monotonic()
        try:
            _CALLS[what][1](rank, comm)
            if rank.device.type == "cuda":  # a call there only queues the work: what became of it is told by the next
                torch.cuda.synchronize()
                _CALLS[what][1](rank, comm)
        except errors.PeerError as error:
            said[step] = {"missing": list(error.missing_ranks), "seconds": time.monotonic() - began, "text": str(error)}
        else:
            raise AssertionError(f"{what} returned although rank {victim} did not take part")
    return said


def works(rank: Rank, victim: int) -> None:
    """The work before the fault; those that will be left have a communicator of their own."""
    others = [r for r in range(rank.world_size) if r != victim]
    if len(others) > 1 and rank.rank != victim:
        rank.comms["others"] = rank.form("conformance_others", others)
    rank.plane.gather(None, what="all are ready")  # the deadline of a call is short here, and nobody is to be late for this one
    rank.comm.all_reduce_(torch.ones(16, device=rank.device))


def loses(rank: Rank, victim: int, how: str) -> dict[str, dict[str, object]]:
    """One rank goes in the middle of the work."""
    if rank.rank == victim:
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    said = {"all_reduce": told(rank, rank.comm, "all_reduce", victim)}
    if "others" in rank.comms:  # the fault is that of one communicator
        # One survivor may learn of the fault at once and another at its deadline: meet where there is more time.
        rank.comms["others"].compare("the survivors", {})
        out = rank.comms["others"].all_reduce(torch.ones(3, device=rank.device))
        assert out.tolist() == [float(rank.world_size - 1)] * 3, "another communicator, without the lost rank, has to go on"
        rank.comms["others"].close()
    return said


def check(outcomes: list[Outcome], victim: int, least: float = 0.0) -> None:
    """Every survivor raised, named nobody but the victim, and raised again at once. One at least had waited `least` seconds."""
    for o in outcomes:
        if o.rank == victim:
            continue
        if o.ended == "skipped":
            pytest.skip(o.message)
        assert o.ended == "returned", f"{o}\n{o.trace}"
        for what, said in o.result.items():
            first = said["first"]
            named = set(first["missing"])
            assert named <= {victim}, f"rank {o.rank} names ranks {named} in {what}, lost is {victim}: {first['text']}"
    survivors = [o.result for o in outcomes if o.rank != victim]
    for what in survivors[0]:
        waited = max(said[what]["first"]["seconds"] for said in survivors)
        assert waited > 0.9 * least, f"{what} gave up on a rank that may be late after {waited:.2f} s, the setting is {least} s"


def lose(worlds: Worlds, size: int, how: str) -> None:
    """Run `loses` with the last rank as the victim."""
    victim = size - 1
    with worlds.fresh(size, config=_CONFIG) as world:
        world.run(works, victim)
        check(world.outcomes(loses, victim, how, limit=_LIMIT_S, grace=None, without={victim}), victim)


@clause("S28", "S29", "S30", "S36")
def test_a_killed_rank(worlds: Worlds, size: int) -> None:
    lose(worlds, size, "kill")


@clause("S28", "S29", "S30")
def test_a_stopped_rank(worlds: Worlds, size: int) -> None:
    lose(worlds, size, "stop")


def misses(rank: Rank, victim: int) -> dict[str, dict[str, object]]:
    """One rank stays away from one call of each collective, each on a communicator and in a thread of its own."""
    calls = [what for what, (capability, _) in _CALLS.items() if capability in rank.spec.capabilities]
    for what in calls:
        rank.comms[what] = rank.form(f"conformance_{what.replace(' ', '_')}")
    if rank.rank == victim:
        return {}
    with ThreadPoolExecutor(len(calls)) as pool:
        return dict(zip(calls, pool.map(lambda what: told(rank, rank.comms[what], what, victim), calls), strict=True))


@clause("S28", "S29", "S30")
def test_an_absent_rank_in_every_collective(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size, config=_CONFIG, form=False) as world:
        check(world.outcomes(misses, size - 1, limit=3 * _LIMIT_S), size - 1, least=_WAIT_S)


def late(rank: Rank, who: int, seconds: float) -> None:
    """A rank that comes late, but in time."""
    n = rank.world_size
    for i in range(2):
        if rank.rank == who:
            time.sleep(seconds)
        out = rank.comm.all_reduce(torch.full((100,), float(i), device=rank.device))
        assert out.tolist() == [float(i * n)] * 100


@clause("S28")
def test_a_late_rank_is_waited_for(world: World) -> None:
    for who in (0, world.size - 1):
        world.run(late, who, 0.3)


def leaves(rank: Rank, culprit: int) -> str:
    """A rank leaves its plane through an exception; the others wait for it."""
    try:
        with rank.plane:
            if rank.rank == culprit:
                raise ValueError("this rank is broken")
            rank.comm.all_reduce(torch.ones(4, device=rank.device))
    except (ValueError, errors.PeerError) as error:
        return type(error).__name__
    return "nothing"


@clause("S28", "S35")
def test_a_rank_that_leaves_through_an_exception(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size, config=_CONFIG) as world:
        said = world.run(leaves, 0, limit=_LIMIT_S)
        assert said == ["ValueError"] + ["PeerError"] * (size - 1)


def starts_again(rank: Rank, victim: int) -> None:
    """After a fault: close, and create again with the ranks that are there."""
    if rank.rank == victim:
        return
    told(rank, rank.comm, "all_reduce", victim)
    rank.comm.close()
    comm = rank.form("conformance", [r for r in range(rank.world_size) if r != victim])
    assert comm.all_reduce(torch.ones(3, device=rank.device)).tolist() == [float(rank.world_size - 1)] * 3
    comm.close()


@clause("S30")
@at_least(3)
def test_the_ranks_that_are_left_form_a_new_communicator(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size, config=_CONFIG) as world:
        world.run(starts_again, 1, limit=_LIMIT_S)
