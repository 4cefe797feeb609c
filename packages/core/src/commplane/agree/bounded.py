"""Run somebody else's code with a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Stalled", "call_bounded"]

T = TypeVar("T")


class Stalled(Exception):
    """The call had not returned at the deadline."""


class _Outcome(Generic[T]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.done = threading.Event()
        self.abandoned = False
        self.value: T | None = None
        self.error: BaseException | None = None


def call_bounded(call: Callable[[], T], seconds: float, what: str, on_late: Callable[[], None] | None = None) -> T:
    """`call` in a thread of its own; its result or its exception. Local.

    A thread cannot be stopped from outside. One that misses the deadline is left to itself, and when it does come back,
    `on_late` is called in it, so that what it built is released.

    Raises:
        Stalled: no result after `seconds`.
    """
    outcome: _Outcome[T] = _Outcome()

    def run() -> None:
        try:
            outcome.value = call()
        except BaseException as error:  # handed to the caller, whatever it is
            outcome.error = error
        with outcome.lock:
            late = outcome.abandoned
            outcome.done.set()
        if late and on_late is not None:
            on_late()

    thread = threading.Thread(target=run, name=f"commplane {what}", daemon=True)
    thread.start()
    outcome.done.wait(seconds)
    with outcome.lock:
        if not outcome.done.is_set():
            outcome.abandoned = True
            raise Stalled(f"{what} did not finish in {seconds:g} s")
    if outcome.error is not None:
        raise outcome.error
    return outcome.value  # type: ignore[return-value]
