"""Turns: some calls of one candidate after a barrier, timed, and how many of them make a turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

from commplane.bench.affinity import pinned

if TYPE_CHECKING:
    from commplane.bench.graphs import Captured
    from commplane.runtime import Communicator, Plane

__all__ = ["TURN_S", "Runner", "agree_on_calls", "beginning", "p99", "take_turn"]

TURN_S = 0.02
"""Seconds that a turn should take."""

# Bounds on the calls of a turn. Where so few take longer than `_LONG_S`, it is one: 64 MiB over Gloo is 0.1 s a call.
_MIN_CALLS, _MAX_CALLS, _LONG_S = 3, 1000, 0.5


@dataclass(frozen=True)
class Runner:
    """One that takes turns.

    Attributes:
        communicator: whose call it is.
        call: what is timed.
        core: every thread of this process is on it for the turn; None leaves them alone.
        graph: calls of this kind in a graph, which is then what is timed.
        begin: what brings together those who begin a turn together, from `beginning`; the communicator's barrier if unset.
    """

    communicator: Communicator
    call: Callable[[], object]
    core: int | None = None
    graph: Captured | None = None
    begin: Callable[[], object] | None = None

    def whole(self, calls: int) -> int:
        """`calls`, rounded up to what whole replays make."""
        return calls if self.graph is None else -(-calls // self.graph.calls) * self.graph.calls

    def place(self) -> AbstractContextManager[None]:
        """Where the turn runs."""
        return nullcontext() if self.core is None else pinned(self.core)


def beginning(plane: Plane, communicator: Communicator) -> Callable[[], object]:
    """What all ranks of `plane` call to begin a turn of `communicator` together; groups side by side have one each. Local.

    The barrier of the communicator, after one of the control plane where other groups have their turn too. A group without
    anything that has a barrier has the latter alone: a turn's uncounted calls then bring the ranks closer.
    """
    has_barrier = communicator.plan.explain("barrier").chosen is not None
    if has_barrier and communicator.world_size == plane.world_size:
        return communicator.barrier

    def meet() -> None:
        plane.gather(None, what="bench turn")
        if has_barrier:
            communicator.barrier()

    return meet


def take_turn(runner: Runner, calls: int) -> list[float]:
    """`calls` timed calls, in microseconds a call, after a barrier and some uncounted ones. Collective.

    The uncounted ones meet a cold cache, and threads that have just been moved. On the CPU each call is timed. On a GPU it is the
    mean of all of them, launched back to back and waited for at the end, which is one number; in a graph it is the device time
    of each replay, divided by its calls.
    """
    with runner.place():
        (runner.begin or runner.communicator.barrier)()
        if runner.graph is not None:
            replays = runner.whole(calls) // runner.graph.calls
            runner.graph.time(warm_up(replays))
            return runner.graph.time(replays)
        return _back_to_back(runner, calls) if runner.communicator.key.device == "cuda" else _one_by_one(runner, calls)


def _one_by_one(runner: Runner, calls: int) -> list[float]:
    call, clock = runner.call, time.perf_counter_ns
    stamps = [0] * (calls + 1)
    for _ in repeat(None, warm_up(calls)):
        call()
    stamps[0] = clock()
    for i in range(1, calls + 1):
        call()
        stamps[i] = clock()
    return [(b - a) / 1000 for a, b in pairwise(stamps)]


def _back_to_back(runner: Runner, calls: int) -> list[float]:
    import torch

    call, clock = runner.call, time.perf_counter_ns
    device = torch.device(runner.communicator.device)
    for _ in repeat(None, warm_up(calls)):
        call()
    torch.cuda.synchronize(device)
    begin = clock()
    for _ in repeat(None, calls):
        call()
    torch.cuda.synchronize(device)
    return [(clock() - begin) / 1000 / calls]


def warm_up(calls: int) -> int:
    """Uncounted calls before `calls` counted ones."""
    return max(1, calls // 10)


def agree_on_calls(plane: Plane, runners: Sequence[Runner]) -> list[int]:
    """Calls that fill a turn of each runner, the same on every rank, from an uncounted first pass. Collective over all ranks."""
    estimates = [statistics.median(take_turn(runner, _MIN_CALLS)) / 1e6 for runner in runners]
    everyone = plane.gather([calls_for(e) for e in estimates], what="bench calibration")
    return [runner.whole(min(rank[i] for rank in everyone)) for i, runner in enumerate(runners)]


def calls_for(seconds: float) -> int:
    """Calls in a turn when one takes `seconds`. Pure."""
    if seconds * _MIN_CALLS > _LONG_S:
        return 1
    return int(min(_MAX_CALLS, max(_MIN_CALLS, TURN_S / max(seconds, 1e-9))))


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
