"""Processes that are killed, stopped, leave by an exception or never come: every other rank says who, in every kind of call."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from car_calls import KINDS, at_once, check, outcome, prepared, raised, right, start
from car_forks import Server

from commplane.testing import Outcome

# The order of the group is not that of the ranks, so an error that named group ranks would name another one.
ORDER = [2, 0, 1]
# A deadline that no test would survive: where it is set, nobody has sat it out.
NEVER = {"timeout": 600}
# One that survivors do sit out; start-up has another.
SOON_S = 2
SOON = {"run_timeout": SOON_S, "startup_timeout": 60}
PATIENCE_S = 120.0

Said = dict[str, dict[str, Any]]


def survivors(outcomes: Sequence[Outcome], lost: int) -> list[Any]:
    """What the others returned."""
    for o in outcomes:
        if o.rank != lost:
            assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes if o.rank != lost]


def meet(store: Any, key: str, world_size: int) -> None:
    """Wait until as many ranks have come here; through the store, so that it works with a communicator that is poisoned."""
    if store.add(key, 1) == world_size:
        store.set(f"{key}/all", "1")
    store.wait([f"{key}/all"], timedelta(seconds=PATIENCE_S))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def loses_a_rank_between_two_calls(store: Any, rank: int, world_size: int, lost: int) -> Said:
    plane = start(store, rank, world_size, **NEVER)
    calls = {}
    for kind in KINDS:
        call, wanted = prepared(plane.communicator(kind, ORDER), kind)
        assert right(call(), wanted), kind
        calls[kind] = call
    if rank == lost:
        die()
    said = {kind: outcome(call) for kind, call in calls.items()}
    plane.close()
    return said


@pytest.mark.parametrize("lost", [1, pytest.param(ORDER[0], marks=pytest.mark.long)])
def test_a_rank_killed_before_a_call_is_named_in_calls_of_every_kind(forks: Server, lost: int) -> None:
    outcomes = forks.run(3, loses_a_rank_between_two_calls, lost, timeout=PATIENCE_S)
    assert outcomes[lost].returncode == -signal.SIGKILL, outcomes[lost].output
    for said in survivors(outcomes, lost):
        for kind in KINDS:
            check(said[kind], kind, lost, "has ended")


def loses_a_rank_in_a_call(store: Any, rank: int, world_size: int, kind: str, last: int, seconds: float) -> dict[str, Any]:
    """Rank 1 is killed `seconds` after the beginning of call number `last`, or right behind it if `seconds` is negative."""
    plane = start(store, rank, world_size, **NEVER)
    call, wanted = prepared(plane.communicator("tp", ORDER), kind)
    got: list[Any] = []
    for i in range(1_000_000):
        if rank == 1 and i == last and seconds >= 0:
            threading.Timer(seconds, die).start()
        error = raised(lambda: got.append(call()))
        if error:
            said = {"calls": i, **error, "again": raised(call)}
            plane.close()
            return said
        assert right(got.pop(), wanted), f"call {i} gave a wrong result"
        if rank == 1 and i == last and seconds < 0:
            die()
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_killed_right_after_a_call_leaves_its_result_whole_and_is_named_in_the_next(forks: Server, kind: str) -> None:
    outcomes = forks.run(3, loses_a_rank_in_a_call, kind, 20, -1.0, timeout=PATIENCE_S)
    assert outcomes[1].returncode == -signal.SIGKILL, outcomes[1].output
    for said in survivors(outcomes, 1):
        check(said, kind, 1, "has ended")
        # It had come back from number 20, so it had met all others there. Who reads the ranks' own memory and was slow to do so
        # gives that call up, if another rank has given up by then: what it read may not be what was meant.
        assert said["calls"] == 21 or (said["calls"] == 20 and ("symmetric" in kind or "single copy" in kind)), said


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_killed_in_a_call_is_named_and_no_result_before_it_is_wrong(forks: Server, kind: str) -> None:
    for seconds in (0.0005, 0.02):
        outcomes = forks.run(3, loses_a_rank_in_a_call, kind, 20, seconds, timeout=PATIENCE_S)
        assert outcomes[1].returncode == -signal.SIGKILL, outcomes[1].output
        for said in survivors(outcomes, 1):
            check(said, kind, 1, "has ended")
            assert said["calls"] >= 20, said


def waits_for_a_rank_that_does_not_call(store: Any, rank: int, world_size: int, how: str) -> Said:
    """Rank 1 is stopped, or alive and busy with something else; the others call in all communicators at once."""
    plane = start(store, rank, world_size, **(SOON if how in ("stop", "busy") else NEVER))
    calls = {kind: prepared(plane.communicator(kind, ORDER), kind)[0] for kind in KINDS}
    meet(store, "ready", world_size)
    if rank == 1 and how == "exception":
        try:
            with plane:
                raise ValueError("user code fails here")
        except ValueError:
            return {}
    if rank == 1 and how != "busy":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 1:
        meet(store, "done", world_size)
        late = {kind: outcome(call) for kind, call in calls.items()}  # too late: the others have given up
        plane.close()
        return late
    if how == "stop, then kill" and rank == 0:
        threading.Timer(0.5, os.kill, (plane.facts[1].pid, signal.SIGKILL)).start()
    said = at_once(calls)
    meet(store, "done", world_size if how == "busy" else world_size - 1)
    if how == "stop":  # both have said what they found
        os.kill(plane.facts[1].pid, signal.SIGKILL)
    plane.close()
    return said


@pytest.mark.long
def test_a_stopped_rank_is_named_at_the_deadline(forks: Server) -> None:
    outcomes = forks.run(3, waits_for_a_rank_that_does_not_call, "stop", timeout=PATIENCE_S)
    for said in survivors(outcomes, 1):
        for kind in KINDS:
            check(said[kind], kind, 1, f"waited up to {SOON_S} s for rank 1")


def test_a_rank_that_never_calls_is_named_at_the_deadline_and_finds_its_communicators_given_up(forks: Server) -> None:
    outcomes = forks.run(3, waits_for_a_rank_that_does_not_call, "busy", timeout=PATIENCE_S)
    for said in survivors(outcomes, 1):
        for kind in KINDS:
            check(said[kind], kind, 1, f"waited up to {SOON_S} s for rank 1")
    assert outcomes[1].error is None, outcomes[1].output
    for kind in KINDS:
        late = outcomes[1].result[kind]
        assert late["error"] == "PeerError" and set(late["missing"]) <= {0, 2} and late["missing"], late
        assert "gave up" in late["text"] and "poisoned" in late["again"]["text"], late


@pytest.mark.long
def test_a_stopped_rank_that_is_killed_is_named_long_before_the_deadline(forks: Server) -> None:
    outcomes = forks.run(3, waits_for_a_rank_that_does_not_call, "stop, then kill", timeout=PATIENCE_S)
    for said in survivors(outcomes, 1):
        for kind in KINDS:
            check(said[kind], kind, 1, "has ended")


def test_an_exception_in_user_code_reaches_the_waiting_ranks_at_once(forks: Server) -> None:
    outcomes = forks.run(3, waits_for_a_rank_that_does_not_call, "exception", timeout=PATIENCE_S)
    assert outcomes[1].returncode == 0, outcomes[1].output
    for said in survivors(outcomes, 1):
        for kind in KINDS:
            check(said[kind], kind, 1, "rank 1 gave up")


def is_stopped_for_a_while(store: Any, rank: int, world_size: int) -> bool:
    plane = start(store, rank, world_size, **NEVER)
    calls = {kind: prepared(plane.communicator(kind, ORDER), kind) for kind in KINDS}
    meet(store, "ready", world_size)
    if rank == 1:
        child = os.fork()
        if child == 0:
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(child, 0)
    for kind, (call, wanted) in calls.items():
        assert right(call(), wanted), kind
    plane.close()
    return True


@pytest.mark.long
def test_a_rank_that_is_stopped_and_goes_on_within_the_deadline_does_no_harm(forks: Server) -> None:
    outcomes = forks.run(3, is_stopped_for_a_while, timeout=PATIENCE_S)
    assert [o.result for o in outcomes] == [True] * 3, [o.output for o in outcomes]


def goes_on_without_the_lost_rank(store: Any, rank: int, world_size: int) -> float | None:
    plane = start(store, rank, world_size, **NEVER)
    tp, other = plane.communicator("tp"), plane.communicator("pair", [0, 2]) if rank != 1 else None
    tp.barrier()
    if rank == 1:
        die()
    assert raised(tp.barrier)["missing"] == [1]
    assert other is not None
    call, wanted = prepared(other, "all_reduce")
    assert right(call(), wanted)
    tp.close()
    again = plane.communicator("tp", [0, 2])
    call, wanted = prepared(again, "all_gather")
    assert right(call(), wanted)
    again.close()
    plane.close()
    return 1.0


def test_survivors_go_on_in_other_communicators_and_make_new_ones(forks: Server) -> None:
    outcomes = forks.run(3, goes_on_without_the_lost_rank, timeout=PATIENCE_S)
    assert survivors(outcomes, 1) == [1.0, 1.0]
