"""Calls of one candidate in a CUDA graph, and what a replay of it takes on the device.

All that this needs of a device is in `capture` and `Captured`: streams, graphs and events of torch.cuda.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import TYPE_CHECKING

from commplane.errors import CommplaneError

if TYPE_CHECKING:
    import torch

    from commplane.runtime import Communicator, Plane

__all__ = ["CALLS", "Captured", "capture"]

CALLS = 20
"""Calls in one graph, back to back: what a replay costs beside them is shared by so many."""

# Before a capture: what is made at the first call (connections, workspaces of libraries, code) is not made inside.
_WARM_UP = 3


@dataclass(frozen=True)
class Captured:
    """A graph of `calls` calls on one device."""

    graph: torch.cuda.CUDAGraph
    device: torch.device
    calls: int

    def time(self, replays: int) -> list[float]:
        """Microseconds of device time a call, of each of `replays` replays on the current stream. Collective as the calls are."""
        import torch

        with torch.cuda.device(self.device):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]  # type: ignore[no-untyped-call]
            marks[0].record()
            for mark in marks[1:]:
                self.graph.replay()
                mark.record()
            marks[-1].synchronize()
        return [a.elapsed_time(b) * 1000 / self.calls for a, b in pairwise(marks)]


def capture(plane: Plane, comm: Communicator, call: Callable[[], object], calls: int = CALLS) -> Captured | str:
    """`calls` calls in one graph, or why they cannot be captured, the same on every rank. Collective over all ranks.

    Inside `Plane.capture` where the plan of `comm` holds what captures; a failure there is a fault of all communicators. A
    backend that declares nothing of the kind may work all the same, as NCCL does: it is tried outside of that, because a failure
    is then this communicator's alone.

    Raises:
        CommplaneError: some ranks captured and others did not.
    """
    problem: str | None = None
    made: Captured | None = None
    try:
        made = _record(plane, comm, call, calls)
    except Exception as error:
        if comm.captures:  # every rank has learned of it in the vote
            raise
        problem = _text(error)
    answers = plane.gather(problem, what="bench capture")
    if made is not None and not any(answers):
        return made
    failed = {r: answer for r, answer in enumerate(answers) if answer}
    if len(failed) < len(answers):
        reasons = "; ".join(f"rank {r}: {answer}" for r, answer in failed.items())
        raise CommplaneError(f"bench: communicator {comm.key} was captured on all ranks but {list(failed)}: {reasons}")
    return str(failed[0])


def _record(plane: Plane, comm: Communicator, call: Callable[[], object], calls: int) -> Captured:
    import torch

    device = torch.device(comm.device)
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in repeat(None, _WARM_UP):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # The threads that transports keep may go on with what they do meanwhile: only this one is held to what a capture allows.
        with (
            plane.capture() if comm.captures else nullcontext(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            for _ in repeat(None, calls):
                call()
    return Captured(graph, device, calls)


def _text(error: BaseException) -> str:
    """One line. What the end of a broken capture raises hides the reason, which is then its context."""
    cause = error.__context__ or error
    return " ".join("".join(traceback.format_exception_only(type(cause), cause)).split())
