"""What a collective of a process group returns: torch's `Work`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C import _distributed_c10d as torch_c10d

from commplane.c10d.lane import Job, Lane
from commplane.errors import PeerError

__all__ = ["DONE", "HOLDS_WORK", "JoinedWork", "QueuedWork", "SAYS_ASYNC", "ended"]

SAYS_ASYNC = hasattr(torch_c10d.AllreduceOptions(), "asyncOp")
"""Whether torch tells a process group if the caller of `all_reduce` waits (torch 2.8)."""

HOLDS_WORK = SAYS_ASYNC
"""Whether torch's C++ keeps the Python object of a `Work` alive (torch 2.7). Without it a queued call would be lost to it."""


class Done(dist.Work):
    """The work of a call that its caller waited for: there is one, made once, because to make one costs more than the lookup."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Nothing is left to wait for."""
        return True

    def is_completed(self) -> bool:
        """Yes."""
        return True

    def is_success(self) -> bool:
        """Yes: a failure was raised."""
        return True

    def exception(self) -> None:
        """None: a failure was raised."""

    def synchronize(self) -> None:
        """Nothing is left to wait for."""

    def result(self) -> list[torch.Tensor]:
        """The caller has the tensors; this object serves every call."""
        return []

    def get_future(self) -> torch.futures.Future[Any]:
        """A future that is set."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result([])
        return future


DONE = Done()


def ended(outputs: Sequence[torch.Tensor]) -> Any:
    """The work of a call that has returned, for whoever asks for its result. On CUDA it ends when the current stream is there.

    Made of torch's own types alone: it is whole also where torch does not keep Python's part of a work.
    """
    devices: list[int | str | torch.device] = sorted({t.device for t in outputs if t.is_cuda}, key=str)
    future: torch.futures.Future[Any] = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
    future.set_result(list(outputs))
    return torch_c10d._create_work_from_future(future)  # type: ignore[attr-defined]  # not in its stubs


class QueuedWork(dist.Work):
    """A call that goes on in the background. Its tensors are held until it has run, whoever else drops them.

    Args:
        lane: runs it.
        call: the collective.
        outputs: what its result and its future hold.
    """

    def __init__(self, lane: Lane, call: Callable[[], Any], outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._lane = lane
        self._outputs = outputs
        self._future: torch.futures.Future[Any] | None = None
        self._job: Job = lane.queue(call)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when the call has run.

        Raises:
            PeerError: `timeout` is over; the call goes on. Else whatever the call raised.
        """
        job = self._job
        if not job.done:
            seconds = timeout.total_seconds() if timeout is not None else 0.0
            if seconds > 0:
                self._wait_for_helper(seconds)
            else:
                self._lane.finish(job)
        if job.error is not None:
            raise job.error
        return True

    def is_completed(self) -> bool:
        """Whether it has run, also if it failed."""
        return self._job.done

    def is_success(self) -> bool:
        """Whether it has run and did not fail."""
        return self._job.done and self._job.error is None

    def exception(self) -> BaseException | None:
        """What it raised, once it has run."""
        return self._job.error

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The tensors that it writes, once it has run."""
        self.wait()
        return list(self._outputs)

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the tensors that it writes; one that failed raises RuntimeError with the text."""
        if self._future is None:
            begun: torch.futures.Future[Any] = torch.futures.Future()
            # A future that is told of an exception from Python holds it as a value, which C++ takes for a result; one whose
            # callback raises has failed for both.
            self._future = begun.then(lambda _: self._value())
            told = threading.Lock()

            def tell() -> None:
                if told.acquire(blocking=False):
                    begun.set_result(None)

            self._job.after.append(tell)
            if self._job.done:
                tell()
            else:
                self._lane.urge()
        return self._future

    def _value(self) -> list[torch.Tensor]:
        if self._job.error is not None:
            raise self._job.error
        return list(self._outputs)

    def _wait_for_helper(self, seconds: float) -> None:
        ran = threading.Event()
        self._job.after.append(ran.set)
        self._lane.urge()
        if not self._job.done and not ran.wait(seconds) and not self._job.done:
            raise PeerError(f"wait: wanted the collective to end within {seconds:g} s, found it running: give it more time")


class JoinedWork(dist.Work):
    """Several works as one: it ends when all of them have.

    Args:
        works: the parts.
        outputs: what its result and its future hold.
    """

    def __init__(self, works: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._works = list(works)
        self._outputs = outputs

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return when all have ended."""
        for work in self._works:
            work.wait() if timeout is None else work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        """Whether all have ended."""
        return all(work.is_completed() for work in self._works)

    def is_success(self) -> bool:
        """Whether all have ended, and none failed."""
        return all(work.is_success() for work in self._works)

    def exception(self) -> BaseException | None:
        """The first failure."""
        return next((error for work in self._works if (error := work.exception()) is not None), None)

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def result(self) -> list[torch.Tensor]:
        """The tensors that they write, once they have ended."""
        self.wait()
        return list(self._outputs)

    def get_future(self) -> torch.futures.Future[Any]:
        """A future of the tensors that they write."""
        return torch.futures.collect_all([work.get_future() for work in self._works]).then(lambda _: list(self._outputs))
