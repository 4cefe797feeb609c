"""Calls that belong together, over torch's own backends: NCCL has to be told where a batch begins and ends, Gloo has no batches.

Without that, in `batch_isend_irecv`, two ranks that each send first and then receive wait for each other. Since 2.11 torch tells
its own class of process group alone, so here the batch is found where it is made: in the frame of torch's function, whose
argument says how many calls belong to it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch.distributed as dist

__all__ = ["Kept", "PeerCalls"]

_BATCH = inspect.unwrap(dist.batch_isend_irecv).__code__
_DEPTH = 6
"""Frames between torch's function and a group's `send`: `isend`, and torch's decorators."""


class PeerCalls:
    """Sends and receives of one process group. Local; what a call does is torch's backend's."""

    def __init__(self) -> None:
        self._batch: FrameType | None = None
        self._left = 0

    def call(self, backend: Any, operation: Callable[..., Any], *args: Any) -> Any:
        """One send or receive: its work, or None before the end of a batch, whose last call returns the work of all."""
        frame = _batch_frame() if self._batch is None else self._batch
        if frame is None:
            return operation(*args)
        if self._batch is None:
            self._batch, self._left = frame, len(frame.f_locals["p2p_op_list"])
            backend._start_coalescing()
        self._left -= 1
        try:
            operation(*args)
        except BaseException:
            self._left = 0
            raise
        finally:
            if self._left == 0:
                self._batch = None
                work = backend._end_coalescing()
        return work if self._batch is None else None


class Kept:
    """A backend of torch's whose works are put on a list, for one that has no batches of its own. Local.

    Args:
        backend: Gloo.
        works: the list.
    """

    def __init__(self, backend: Any, works: list[Any]) -> None:
        self._backend = backend
        self._works = works

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._backend, name)

        def call(*args: Any, **named: Any) -> Any:
            work = operation(*args, **named)
            self._works.append(work)
            return work

        return call


def _batch_frame() -> FrameType | None:
    """The frame of torch's `batch_isend_irecv` that this call is made in, if it is in one."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None or frame.f_code is _BATCH:
            return frame
        frame = frame.f_back
    return None
