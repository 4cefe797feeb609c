"""Time and threads of the control plane, in one place, so that a simulation can put its own there.

Whatever in `agree` asks for the time, pauses, waits for a thread or starts one does it through the `Clock` that it was made
with. `REAL` is the clock of this process and costs what the plain calls cost.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

__all__ = ["REAL", "Clock", "Signal", "Worker"]


class Signal(Protocol):
    """What one thread sets and another waits for: `threading.Event`."""

    def set(self) -> None:
        """Let go who waits."""

    def is_set(self) -> bool:
        """Whether `set` was called."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds; whether `set` was called."""


class Worker(Protocol):
    """Makes calls one after the other, in a thread of its own."""

    def submit(self, call: Callable[[], None]) -> None:
        """Make `call`, which must not raise, after those before it. Does not wait."""


class Clock:
    """The clock and the threads of this process; a simulation overrides every method."""

    def now(self) -> float:
        """Seconds; only differences mean anything."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Pause this thread."""
        time.sleep(seconds)

    def signal(self) -> Signal:
        """A new signal, not set."""
        return threading.Event()

    def start(self, call: Callable[[], None], name: str) -> None:
        """Make `call`, which must not raise, in a new daemon thread."""
        try:
            worker = _idle.pop()
        except IndexError:
            worker = _Reused()
        worker.begin(call, name)

    def worker(self, name: str) -> Worker:
        """A new worker; its thread starts with the first call."""
        return _Thread(name)


class _Reused:
    """A thread that is kept for the next call once its own has returned: starting one costs more than most calls."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], None], str]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, call: Callable[[], None], name: str) -> None:
        self._calls.put((call, name))
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        thread = threading.current_thread()
        while True:
            call, name = self._calls.get()
            thread.name = name
            call()
            del call  # it may hold what the caller wants to be rid of
            if len(_idle) >= _KEPT:
                return
            thread.name = "commplane idle"
            _idle.append(self)


# Threads that wait for a call; more than this are not kept.
_KEPT = 256
_idle: deque[_Reused] = deque()
os.register_at_fork(after_in_child=_idle.clear)  # a forked child has none of these threads


class _Thread:
    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def submit(self, call: Callable[[], None]) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True)
                self._thread.start()
        self._calls.put(call)

    def __del__(self) -> None:
        self._calls.put(None)  # nobody can submit any more


def _serve(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """Body of a worker's thread; it does not hold the worker, so that it ends with it."""
    while (call := calls.get()) is not None:
        call()
        del call  # it may hold the worker


REAL = Clock()
