"""Run somebody else's code with a deadline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from commplane.agree.clock import REAL, Clock

__all__ = ["Abandoned", "Stalled", "call_bounded"]

T = TypeVar("T")

# Between two looks at the reason to give up.
_LOOK_EVERY_S = 0.05


class Abandoned(Exception):
    """The call was left to itself before it returned; its thread still runs. `__cause__` says why, if not the deadline."""


class Stalled(Abandoned):
    """The call had not returned at the deadline."""


def call_bounded(
    call: Callable[[], T],
    seconds: float,
    what: str,
    *,
    on_late: Callable[[], None] | None = None,
    give_up: Callable[[], Exception | None] | None = None,
    look_every: float = _LOOK_EVERY_S,
    clock: Clock = REAL,
) -> T:
    """`call` in a thread of its own; its result or its exception. Local.

    A thread cannot be stopped from outside. One that misses the deadline is left to itself, and when it does come back,
    `on_late` is called in it, so that what it built is released.

    Args:
        call: what to run.
        seconds: how long it may take.
        what: its name in the error.
        on_late: called in the thread if it comes back after it was left.
        give_up: asked now and then while waiting; an exception it returns is a reason not to wait any longer.
        look_every: seconds between two such questions.
        clock: by which to wait.

    Raises:
        Stalled: no result after `seconds`.
        Abandoned: `give_up` had a reason.
    """
    lock = threading.Lock()
    done = clock.signal()
    left = False
    result: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:  # handed to the caller, whatever it is
            failure.append(error)
        with lock:
            done.set()
            late = left
        if late and on_late is not None:
            on_late()

    clock.start(run, f"commplane {what}")
    deadline = clock.now() + seconds
    reason: Exception | None = None
    try:
        while not done.wait(max(0.0, min(look_every if give_up else seconds, deadline - clock.now()))):
            reason = give_up() if give_up is not None else None
            if reason is not None or clock.now() >= deadline:
                break
    finally:  # also when the wait itself is interrupted: the thread has to know that nobody waits for it
        with lock:
            left = not done.is_set()
    if left and reason is not None:
        raise Abandoned(f"{what} was given up") from reason
    if left:
        raise Stalled(f"{what} did not finish in {seconds:g} s")
    if failure:
        raise failure[0]
    return result[0]  # type: ignore[no-any-return]
