"""How long a call takes on this rank: by the clock of the host, or of the device where it replays a graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import repeat
from typing import TYPE_CHECKING, Any

from commplane.agree.device import settle

if TYPE_CHECKING:
    import torch

__all__ = ["Timer", "by_clock", "in_graphs", "warmed_up"]

Timer = Callable[[int], float]
"""Microseconds a call, of so many. Collective as the calls are."""

_WARM_UP = 3
_CALLS_IN_GRAPH = 10


def by_clock(call: Callable[[], Any], device: str) -> Timer:
    """Calls one after the other. The first ones of a turn are not counted."""

    def timer(calls: int) -> float:
        for _ in repeat(None, _WARM_UP):
            call()
        settle(device)
        begin = time.perf_counter()
        for _ in repeat(None, calls):
            call()
        settle(device)
        return (time.perf_counter() - begin) / calls * 1e6

    return timer


def warmed_up(call: Callable[[], Any]) -> torch.cuda.Stream:
    """A stream to capture in, on which the call has run. Collective as the call is."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in repeat(None, _WARM_UP):
            call()
    torch.cuda.synchronize()
    return stream


def in_graphs(call: Callable[[], Any], stream: torch.cuda.Stream, capturing: Callable[[], AbstractContextManager[Any]]) -> Timer:
    """Replays of a CUDA graph that holds the call some times over, captured here. Collective.

    Args:
        call: what to time, warmed up.
        stream: to capture in.
        capturing: around the capture, where the plan needs that.
    """
    import torch

    graph = torch.cuda.CUDAGraph()
    # Threads that transports keep may go on meanwhile: only this one is held to what a capture allows.
    with capturing(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in repeat(None, _CALLS_IN_GRAPH):
            call()

    def timer(calls: int) -> float:
        replays = max(1, calls // _CALLS_IN_GRAPH)
        graph.replay()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        for _ in repeat(None, replays):
            graph.replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) * 1000 / (replays * _CALLS_IN_GRAPH)

    return timer
