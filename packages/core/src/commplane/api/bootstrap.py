"""The control plane as plugins see it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Bootstrap", "Deadline"]


class Deadline:
    """A point in time, on the monotonic clock of this process; in a simulation on that of `now`."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._end = now() + seconds

    def remaining(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._end - self._now())

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return self.remaining() == 0.0


class Bootstrap(Protocol):
    """Out-of-band exchange between the ranks of one group. Slow, reliable, and bounded in every wait.

    Every method is collective over the group: each rank calls the same methods in the same order. Values are what JSON can
    hold. If a rank does not come within the deadline, all others raise `PeerError` naming it; if a rank failed while it built
    its part, all others raise at once with that rank's reason.
    """

    @property
    def rank(self) -> int:
        """Group rank."""

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks in group order."""

    def all_gather(self, value: Any, *, what: str, timeout: float | None = None) -> list[Any]:
        """Every rank's value, in group order. `what` names the step in errors."""

    def broadcast(self, value: Any, *, src: int = 0, what: str, timeout: float | None = None) -> Any:
        """The value of group rank `src`; what other ranks pass is ignored."""

    def barrier(self, *, what: str, timeout: float | None = None) -> None:
        """Return when all ranks have come here."""

    def store(self, name: str) -> Any:
        """A `torch.distributed.Store` of this group's own, for transports that bring their own rendezvous. Local."""
