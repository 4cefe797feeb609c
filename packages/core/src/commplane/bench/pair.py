"""A fused all-reduce + RMSNorm, and what it replaces: the all-reduce, and then torch's own operations.

There are several ways to write either. The fastest one here is taken, so that a fused collective is compared with what a careful
user would have written, not with the slowest that can be found.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from commplane.api import add_rms_norm
from commplane.bench.graphs import Captured, capture
from commplane.bench.timing import Runner, agree_on_calls, beginning, take_turn

if TYPE_CHECKING:
    import torch

    from commplane.runtime import Communicator, Plane

__all__ = ["fastest", "fused", "pairs"]

Way = Callable[[], "tuple[torch.Tensor, torch.Tensor]"]

_EPS = 1e-6


def pairs(comm: Communicator, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> dict[str, Way]:
    """The ways to write it, by name. A call is collective and gives the norm and the new residual."""
    import torch

    def composed(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(total, residual, weight, _EPS)

    def of_torch(total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total.add_(residual)
        return torch.nn.functional.rms_norm(total, weight.shape, weight, _EPS), total

    return {
        "all_reduce, add_rms_norm": lambda: composed(comm.all_reduce(tensor)),
        "all_reduce, add_, rms_norm": lambda: of_torch(comm.all_reduce(tensor)),
        "all_reduce_, add_rms_norm": lambda: composed(comm.all_reduce_(tensor)),
        "all_reduce_, add_, rms_norm": lambda: of_torch(comm.all_reduce_(tensor)),
    }


def fused(comm: Communicator, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> dict[str, Way]:
    """The ways to call it, by name."""
    return {
        "new tensors": lambda: comm.all_reduce_rms_norm(tensor, residual, weight, _EPS),
        "in place": lambda: comm.all_reduce_rms_norm_(tensor, residual, weight, _EPS),
    }


def fastest(plane: Plane, comm: Communicator, ways: dict[str, Way], *, graph: bool = False) -> tuple[str, Way]:
    """The way that took the least time in a turn each, summed over the ranks. Collective over all ranks.

    With `graph` in a replay, of those that can be captured; where none can, the first, and whoever captures it learns why.
    """
    captured = {name: capture(plane, comm, way) if graph else None for name, way in ways.items()}
    ways = {name: way for name, way in ways.items() if not isinstance(captured[name], str)} or dict(list(ways.items())[:1])
    if len(ways) == 1:
        return next(iter(ways.items()))
    begin = beginning(plane, comm)
    runners = [
        Runner(comm, way, graph=made if isinstance(made := captured[name], Captured) else None, begin=begin)
        for name, way in ways.items()
    ]
    calls = agree_on_calls(plane, runners)
    times = [statistics.median(take_turn(runner, n)) for runner, n in zip(runners, calls, strict=True)]
    everyone = plane.gather(times, what="bench of the ways to norm")
    name = min(zip(ways, map(sum, zip(*everyone, strict=True)), strict=True), key=lambda item: item[1])[0]
    return name, ways[name]
