"""A thread that does one thing whenever it is told to, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Worker"]

T = TypeVar("T")


class Worker(Generic[T]):
    """Runs `work` once for each `start`, beside the thread that started it; `wait` has its result or raises what it raised.

    Two locks and no queue or condition: the hand-over is on the path of every step of a scheduler. While it has nothing to do
    the thread sleeps in the kernel; how it waits inside `work` is the business of that.

    A daemon, so that a process that was told to end does not wait for a peer that is lost.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = work
        self._go, self._done = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._done.acquire()
        self._result: T | None = None
        self._error: BaseException | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Let it run once. Local, does not wait; not again before `wait` has returned True."""
        self._go.release()

    def wait(self, timeout: float) -> bool:
        """Wait until what was started has ended: False if it has not after `timeout` seconds, and then it may be asked again."""
        return self._done.acquire(timeout=timeout)

    def outcome(self) -> T:
        """The result, or what was raised, after `wait` has returned True."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result  # type: ignore[return-value]

    def stop(self, timeout: float) -> bool:
        """End the thread once it has nothing to do: False if it still runs after `timeout` seconds. Idempotent."""
        if not self._stopping:
            self._stopping = True
            if self._go.locked():  # else it is about to run, and sees that it is to stop
                self._go.release()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            if self._stopping:
                return
            try:
                self._result = self._work()
            except BaseException as error:  # raised again by the thread that waits
                self._error = error
            self._done.release()
