"""Ranks that are killed where nobody waits for them in a round: the others name them, and do not wait for the deadline."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

import commplane
from commplane import errors, hookimpl
from commplane.agree import StoreBootstrap
from commplane.api import BackendSpec, BuildContext, Capability, CommBackend, Usable
from commplane.plugins import PluginHost
from commplane.testing import run_processes, run_threads

# Longer than a test may take: whoever waits for a deadline fails it.
FOREVER_S = 300
LIMIT_S = 90


def leader_dies(store: Any, rank: int, world_size: int) -> list[Any]:
    plane = commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost(), config={"timeout": FOREVER_S})
    if rank == 0:
        StoreBootstrap._lead = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    try:
        plane.gather(rank, what="test")
    except errors.PeerError as error:
        return [list(error.missing_ranks), str(error)]
    return []


def test_a_leader_killed_before_it_published_is_named_long_before_the_deadline() -> None:
    outcomes = run_processes(3, leader_dies, timeout=LIMIT_S)
    assert outcomes[0].returncode == -signal.SIGKILL
    for o in outcomes[1:]:
        assert o.result and o.result[0] == [0] and "rank 0 has ended" in o.result[1], o.output


def test_a_leader_that_never_publishes_is_named_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    real = StoreBootstrap._lead

    def stalls(self: StoreBootstrap, base: str, patience: float, deadline: float) -> dict[str, Any]:
        if self._who.startswith("[stalled"):
            while not self._store.peek(f"{base}/all"):  # until the others have decided the round
                time.sleep(0.01)
        return real(self, base, patience, deadline)

    monkeypatch.setattr(StoreBootstrap, "_lead", stalls)

    def rank_main(plane: commplane.Plane) -> list[int]:
        control = plane._world.child("stalled", who=f"[stalled rank {plane.rank}]", timeout=1.0)
        with pytest.raises(errors.PeerError) as caught:
            control.barrier(what="test")
        return list(caught.value.missing_ranks)

    leader, follower = run_threads(2, rank_main, timeout=LIMIT_S)
    assert follower == [0] and leader == []


class Connects(CommBackend):
    """Opens like a transport that waits for all peers in code of its own: for longer than the test."""

    def open(self, context: BuildContext) -> None:
        if context.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait(FOREVER_S)

    def all_reduce_(self, tensor: Any, op: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def usable(_request: Any, _facts: Any) -> Usable:
    return Usable()


class Site:
    """A plugin with that backend."""

    @hookimpl
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        return [
            BackendSpec(
                name="connects",
                api=(1, 0),
                factory="commplane_rank_main:Connects",  # what `run_processes` calls this file
                probe="commplane_rank_main:usable",
                device="cpu",
                capabilities={Capability.ALL_REDUCE},
                dtypes={"float32"},
            )
        ]


def dies_while_a_backend_connects(store: Any, rank: int, world_size: int) -> list[Any]:
    host = PluginHost()
    host.register(Site(), "connects")
    plane = commplane.init(store=store, rank=rank, world_size=world_size, plugins=host, config={"timeout": FOREVER_S})
    try:
        plane.communicator("tp")
    except errors.PeerError as error:
        return [list(error.missing_ranks), str(error)]
    return []


def test_a_rank_killed_while_a_backend_waits_for_it_outside_of_a_round_is_named_at_once() -> None:
    outcomes = run_processes(3, dies_while_a_backend_connects, timeout=LIMIT_S)
    assert outcomes[1].returncode == -signal.SIGKILL
    for o in (outcomes[0], outcomes[2]):
        assert o.result and o.result[0] == [1] and "rank 1 has ended" in o.result[1], o.output
