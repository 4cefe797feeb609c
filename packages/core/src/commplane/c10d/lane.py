"""The order of the calls on one communicator, and who runs those that nobody waits for yet.

A communicator takes calls from one thread at a time, and all ranks have to make them in one order. A call that its caller waits
for runs in the caller's thread. One that is to go on in the background is queued, and runs in whichever thread comes first: the
one that waits for it, which costs no switch of threads, or this lane's helper, so that it makes progress also where nobody waits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["Job", "Lane"]

_GRACE = 0.001
"""Seconds that a queued call is left to a caller who may be about to wait for it."""
_IDLE = 50
"""Rounds of `_GRACE` without work after which the helper sleeps until it is called."""


class Job:
    """One queued call.

    Attributes:
        call: what to run; dropped when it has run, with the tensors that it holds.
        done: whether it has run.
        error: what it raised.
        after: called once it has run, outside of the lane's lock.
    """

    __slots__ = ("after", "call", "done", "error")

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call: Callable[[], Any] | None = call
        self.done = False
        self.error: BaseException | None = None
        self.after: list[Callable[[], None]] = []


class Lane:
    """Runs calls one at a time, in the order in which they were made. Every method is local; what runs is collective."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._wake = threading.Event()
        self._watching = False
        self._helper: threading.Thread | None = None
        self._closed = False

    def run(self, call: Callable[..., Any], *args: Any) -> Any:
        """Run `call` in this thread, after all that was queued before it."""
        if self._jobs:
            self.drain()
        with self._lock:
            return call(*args)

    def queue(self, call: Callable[[], Any]) -> Job:
        """Run `call` after all others, some time from now; on a closed lane now, in this thread, so that its future ends too."""
        job = Job(call)
        self._jobs.append(job)
        if self._closed:  # looked at after the job is there: `_watch` looks for jobs once more after it has seen the end
            self.drain()
        elif not self._watching:
            self._call_helper()
        return job

    def finish(self, job: Job) -> None:
        """Return when `job` has run; it and those before it run in this thread, unless the helper is at them."""
        while not job.done:
            self._step(job)

    def drain(self) -> None:
        """Return when everything queued has run. What a job raises is kept for those who wait for it."""
        while self._jobs:
            self._step()

    def urge(self) -> None:
        """Have the helper start at once: somebody waits who cannot run the call."""
        self._wake.set()

    def rest(self, seconds: float) -> None:
        """Return when no call runs, or after `seconds`."""
        if self._lock.acquire(timeout=seconds):
            self._lock.release()

    def close(self) -> None:
        """Let the helper run what is queued, and end. Idempotent."""
        self._closed = True
        self._wake.set()

    def _step(self, wanted: Job | None = None) -> None:
        """Run the next job unless `wanted` has run, or wait for the thread that is at one; the call's own deadline ends that."""
        with self._lock:
            if not self._jobs or (wanted is not None and wanted.done):
                return
            job = self._jobs[0]
            call, job.call = job.call, None
            try:
                if call is not None:
                    call()
            except BaseException as error:
                job.error = error
                if not isinstance(error, Exception):  # an interrupt is this thread's, too
                    raise
            finally:
                job.done = True
                self._jobs.popleft()
        for tell in job.after:
            tell()

    def _call_helper(self) -> None:
        self._watching = True
        if self._helper is None:
            self._helper = threading.Thread(target=_help, args=(self,), name=f"commplane {self._name}", daemon=True)
            self._helper.start()
        else:
            self._wake.set()

    def _watch(self) -> None:
        """Body of the helper thread. Its waits are for work of this process, never for a peer."""
        idle = 0
        while not self._closed:
            if self._wake.wait(_GRACE):
                self._wake.clear()
            if self._jobs:
                idle = 0
                self.drain()
            elif idle < _IDLE:
                idle += 1
            else:
                self._watching = False
                if not self._jobs and not self._closed:  # the event may have been spent on the wait above
                    self._wake.wait()
                self._watching, idle = True, 0
        self.drain()  # what was queued before the end: each of them has somebody who waits, or a future


def _help(lane: Lane) -> None:
    lane._watch()
