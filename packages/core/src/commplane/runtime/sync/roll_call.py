"""Who is missing, asked over the control plane where the transport cannot tell, or cannot tell all."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from commplane.agree import StoreBootstrap
from commplane.errors import CommplaneError, PeerError

__all__ = ["BEFORE_ROLL_CALL", "RollCall"]

BEFORE_ROLL_CALL = 0.75
"""Of the deadline of a round, for the exchange: the rest is for the roll call."""

# Of the deadline: how often a rank whose round is out asks whether another has given up. Many times in the time that a roll
# call takes, so that a rank that has just come is there for it, and seldom enough for a store that serves a thousand ranks.
_ASK_EVERY = 1 / 40
_ASK_AT_LEAST_S, _ASK_AT_MOST_S = 0.02, 1.0


class RollCall:
    """Finds the missing ranks of a round, once: a round that has failed is not used again.

    The first rank that gives up calls it. The others, which may be anywhere in native code that cannot be interrupted, or between
    `issue` and `result`, answer by a thread of their own. So a rank that came late to the round, and would wait longer, is not
    taken for missing; who has not answered when the time of the one that called is over is.

    Args:
        bootstrap: control plane of the round, which nothing else uses any more.
        who: how errors begin.
        timeout: seconds that a round may take.
    """

    def __init__(self, bootstrap: StoreBootstrap, who: str, timeout: float) -> None:
        self._bootstrap = bootstrap
        self._alarm = bootstrap.child("alarm", who=who, timeout=timeout)
        self._timeout = timeout
        self._every = min(max(timeout * _ASK_EVERY, _ASK_AT_LEAST_S), _ASK_AT_MOST_S)
        self._wake, self._ended = threading.Event(), threading.Event()
        self._deadline = 0.0
        self._missing: tuple[int, ...] | None = None
        self._thread: threading.Thread | None = None
        self.reason: CommplaneError | None = None
        """Why another rank called, or its end that was noticed; None while nobody did."""

    def attend(self, began: Callable[[], float | None]) -> None:
        """Answer from now on. Local, does not wait; idempotent.

        Args:
            began: when the round that is out began, in monotonic seconds; None while none is out.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(began,), name="commplane sync roll call", daemon=True)
            self._thread.start()

    def call(self, deadline: float) -> None:
        """Give up on the round; all ranks are asked to answer. Local, does not wait.

        Args:
            deadline: until when they may, in monotonic seconds.
        """
        self._deadline = deadline
        self._wake.set()

    def missing(self) -> tuple[int, ...] | None:
        """Global ranks that did not answer to `call`, empty if all did; None if that could not be found out. Waits."""
        # The thread keeps to the deadline; the rest is for a store that is slow to say so.
        left = max(self._deadline - time.monotonic(), self._slack)
        return self._missing if self._ended.wait(left + self._slack) else None

    def stop(self) -> None:
        """End the thread, unless it waits for answers: then it ends by itself at the deadline. Local, idempotent."""
        self._wake.set()

    @property
    def _slack(self) -> float:
        return max(0.05 * self._timeout, 0.1)

    def _run(self, began: Callable[[], float | None]) -> None:
        while not self._wake.wait(self._every):
            since = began()
            if since is None:
                continue
            reason = self._alarm.peer_failed()
            if isinstance(reason, PeerError) and not reason.missing_ranks:  # the store is lost, which is not the end of the round
                self._wake.wait()
            elif reason is not None:
                self.reason = reason
                # Whoever called has less time left than that, and decides.
                least = (1 - BEFORE_ROLL_CALL) * self._timeout + 2 * self._every
                self._deadline = max(since + self._timeout, time.monotonic() + least)
                break
        if self._deadline:
            self._answer()
        self._ended.set()

    def _answer(self) -> None:
        """Say that this rank is there, and wait for the others."""
        self._alarm.fail("gave up waiting for other ranks in a sync round")
        self._bootstrap.begin("roll call")
        try:
            self._bootstrap.barrier(what="roll call", timeout=max(self._deadline - time.monotonic(), 0.001))
        except PeerError as error:
            self._missing = error.missing_ranks or None
        except CommplaneError:  # inside a capture, or the store is lost: the round's own error has to do
            self._missing = None
        else:
            self._missing = ()
