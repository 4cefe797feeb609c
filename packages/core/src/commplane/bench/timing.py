"""Turns: some calls of one candidate after a barrier, timed one by one, and how many of them make a turn."""

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
    from commplane.runtime import Communicator, Plane

__all__ = ["TURN_S", "Runner", "agree_on_calls", "p99", "take_turn"]

TURN_S = 0.02
"""Seconds that a turn should take."""

# Bounds on the calls of a turn. Where so few take longer than `_LONG_S`, it is one: 64 MiB over Gloo is 0.1 s a call.
_MIN_CALLS, _MAX_CALLS, _LONG_S = 3, 1000, 0.5


@dataclass(frozen=True)
class Runner:
    """One that takes turns.

    Attributes:
        communicator: its ranks begin a turn together.
        call: what is timed.
        core: every thread of this process is on it for the turn; None leaves them alone.
    """

    communicator: Communicator
    call: Callable[[], object]
    core: int | None = None

    def place(self) -> AbstractContextManager[None]:
        """Where the turn runs."""
        return nullcontext() if self.core is None else pinned(self.core)


def take_turn(runner: Runner, calls: int) -> list[float]:
    """`calls` timed calls, in microseconds each, after a barrier and some uncounted ones. Collective.

    The uncounted ones meet a cold cache, and threads that have just been moved. On a GPU a call is timed until its result is
    there.
    """
    call, clock = _until_done(runner), time.perf_counter_ns
    stamps = [0] * (calls + 1)
    with runner.place():
        runner.communicator.barrier()
        for _ in repeat(None, warm_up(calls)):
            call()
        stamps[0] = clock()
        for i in range(1, calls + 1):
            call()
            stamps[i] = clock()
    return [(b - a) / 1000 for a, b in pairwise(stamps)]


def warm_up(calls: int) -> int:
    """Uncounted calls before `calls` counted ones."""
    return max(1, calls // 10)


def agree_on_calls(plane: Plane, runners: Sequence[Runner]) -> list[int]:
    """Calls that fill a turn of each runner, the same on every rank, from an uncounted first pass. Collective over all ranks."""
    estimates = [statistics.median(take_turn(runner, _MIN_CALLS)) / 1e6 for runner in runners]
    everyone = plane.gather([calls_for(e) for e in estimates], what="bench calibration")
    return [min(rank[i] for rank in everyone) for i in range(len(runners))]


def calls_for(seconds: float) -> int:
    """Calls in a turn when one takes `seconds`. Pure."""
    if seconds * _MIN_CALLS > _LONG_S:
        return 1
    return int(min(_MAX_CALLS, max(_MIN_CALLS, TURN_S / max(seconds, 1e-9))))


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def _until_done(runner: Runner) -> Callable[[], object]:
    device = runner.communicator.device
    if not device.startswith("cuda"):
        return runner.call
    import torch

    launch, wait = runner.call, torch.cuda.synchronize

    def call() -> None:
        launch()
        wait(device)

    return call
