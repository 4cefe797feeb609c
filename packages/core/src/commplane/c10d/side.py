"""What a process group has for one type of device: a communicator, and what its plan serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from commplane.api import Collective, ReduceOp
from commplane.c10d.lane import Lane
from commplane.c10d.work import DONE, HOLDS_WORK, QueuedWork, ended
from commplane.errors import PeerError
from commplane.runtime import Communicator

__all__ = ["Side"]

_OPS: dict[int, ReduceOp] = {
    hash(dist.ReduceOp(kind)): op
    for kind, op in (
        (dist.ReduceOp.SUM, ReduceOp.SUM),
        (dist.ReduceOp.AVG, ReduceOp.AVG),
        (dist.ReduceOp.MIN, ReduceOp.MIN),
        (dist.ReduceOp.MAX, ReduceOp.MAX),
    )
}
"""By what torch's op hashes to: the cheapest that can be read from it."""


class _Served(dict[tuple[int, torch.dtype], "str | None"]):
    """(hash of torch's op, dtype) -> the op of the communicator, or None where its plan has not all sizes. Equal on all ranks."""

    def __init__(self, communicator: Communicator, collective: Collective) -> None:
        super().__init__()
        self._communicator = communicator
        self._collective = collective

    def __missing__(self, key: tuple[int, torch.dtype]) -> str | None:
        op = _OPS.get(key[0])
        found = None if op is None or not _all_sizes(self._communicator, self._collective, op, key[1]) else str(op)
        self[key] = found
        return found


class _Carriers(dict[torch.dtype, "torch.dtype | None"]):
    """dtype -> as which dtype it is moved: itself, bytes, or None where the plan has neither. Equal on all ranks."""

    def __init__(self, communicator: Communicator, collective: Collective) -> None:
        super().__init__()
        self._communicator = communicator
        self._collective = collective

    def __missing__(self, dtype: torch.dtype) -> torch.dtype | None:
        choices = (dtype, torch.uint8)
        found = next((d for d in choices if _all_sizes(self._communicator, self._collective, None, d)), None)
        self[dtype] = found
        return found


class Side:
    """One type of device of one process group.

    Args:
        communicator: over the group's ranks; the caller closes it.
        lane: in which calls go on in the background; None on CUDA, where a call only queues work for the GPU.
        renamed: the global rank of each rank of the plane, where the two differ.

    Attributes:
        all_reduce: what `Communicator.all_reduce_` takes, by op and dtype.
        reduce_scatter: likewise.
        all_gather: as which dtype elements travel.
        broadcast: likewise.
    """

    def __init__(self, communicator: Communicator, lane: Lane | None, renamed: Sequence[int] | None = None) -> None:
        self.communicator = communicator
        self.lane = lane
        self._renamed = renamed
        self.all_reduce = _Served(communicator, Collective.ALL_REDUCE)
        self.reduce_scatter = _Served(communicator, Collective.REDUCE_SCATTER)
        self.all_gather = _Carriers(communicator, Collective.ALL_GATHER)
        self.broadcast = _Carriers(communicator, Collective.BROADCAST)

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call and wait: on CUDA for what a call there waits for."""
        try:
            return call(*args) if self.lane is None else self.lane.run(call, *args)
        except PeerError as error:
            raise self._with_global_ranks(error) from error.__cause__

    def post(self, call: Callable[[], Any], outputs: Sequence[torch.Tensor]) -> Any:
        """Call now or later: a work whose result is `outputs`."""
        if self.lane is None or not HOLDS_WORK:
            self.run(call)
            return ended(outputs)

        def named() -> None:
            try:
                call()
            except PeerError as error:
                raise self._with_global_ranks(error) from error.__cause__

        return QueuedWork(self.lane, call if self._renamed is None else named, outputs)

    def do(self, call: Callable[[], Any], outputs: Sequence[torch.Tensor], *, wait: bool) -> Any:
        """`run` or `post`: a work either way."""
        if not wait:
            return self.post(call, outputs)
        self.run(call)
        return DONE

    def _with_global_ranks(self, error: PeerError) -> PeerError:
        """The same with global ranks, where the plane was made over a subset of the job and has its own count."""
        if self._renamed is None or not error.missing_ranks:
            return error
        ranks = [self._renamed[r] for r in error.missing_ranks]
        return PeerError(f"{error}; in global ranks: lost {', '.join(map(str, ranks))}", ranks)


def _all_sizes(communicator: Communicator, collective: Collective, op: ReduceOp | None, dtype: torch.dtype) -> bool:
    """Whether the plan has a route for this at every size, so that ranks need not compare sizes before they choose a way."""
    end: int | None = 0
    for route in communicator.plan.serving(collective, op, str(dtype).removeprefix("torch.")):
        if end is None or route.low > end:
            return False
        end = route.high
    return end is None
