"""The flight records of one communicator on this rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from commplane.api import CommBackend, GroupKey
from commplane.errors import PeerError
from commplane.flight.ring import Bindable, FlightRing, bindable

__all__ = ["GroupFlight"]

# How long a close waits for a dump that is reading the backends; reading is local and takes milliseconds.
_READ_S = 5.0


class GroupFlight:
    """Who records the calls of one communicator, and what became of it.

    Args:
        key: the group.
        instance: the how many-th communicator with this key; equal on all its ranks.
        rank: group rank of this process.
        plan: digest of the plan.
        backends: the open backends by name, in the order of the plan.
        length: calls held for each backend; 0 for none, and nothing is read from backends that keep their own.
        dump: writes the records of the whole plane because of an error: the file, or None if that failed or is off.
        done: called when this communicator is closed.

    Attributes:
        closed: whether `close` was called.
    """

    def __init__(
        self,
        key: GroupKey,
        instance: int,
        rank: int,
        plan: str,
        backends: Mapping[str, CommBackend],
        length: int,
        dump: Callable[[BaseException, str], Path | None],
        done: Callable[[GroupFlight], None],
    ) -> None:
        self.key = key
        self._instance = instance
        self._rank = rank
        self._plan = plan
        self._backends = dict(backends)
        self._names = list(backends)
        self._length = length
        self._dump = dump
        self._done = done
        wanting = [name for name, b in backends.items() if not b.keeps_flight_records] if length else []
        self._rings = {name: FlightRing(length) for name in wanting}
        self._fault: dict[str, Any] | None = None
        self._remains: dict[str, Any] | None = None
        self.closed = False
        # A dump reads the backends from another thread: none may close meanwhile, it would free what is being read.
        self._reading = threading.Lock()

    def bindable(self) -> dict[str, Bindable]:
        """The backends as a dispatch table is to bind them: those that keep no records are written down by core."""
        return bindable(self._backends, self._rings)

    def failed(self, error: BaseException) -> Path | None:
        """The communicator cannot go on because of `error`: dump. The file, or None. Local; never raises for want of one."""
        self._fault = {
            "type": type(error).__name__,
            "text": str(error),
            "missing_ranks": list(error.missing_ranks) if isinstance(error, PeerError) else [],
        }
        return self._dump(error, f"{self.key} failed: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Before the backends close: keep what a fault left, and let go of the backends. Local, idempotent."""
        if self.closed:
            return
        if self.faulted:
            self._remains = self.to_json("closed")
        held = self._reading.acquire(timeout=_READ_S)
        self.closed = True
        self._backends = {}
        self._rings = {}
        if held:
            self._reading.release()
        self._done(self)

    @property
    def faulted(self) -> bool:
        """Whether a fault was noted."""
        return self._fault is not None

    def to_json(self, state: str | None = None) -> dict[str, Any]:
        """What a dump says of this communicator. Local, from any thread."""
        if self._remains is not None:
            return self._remains
        records: dict[str, Any] = {}
        problems: dict[str, str] = {}
        with self._reading:
            for name, backend in (self._backends if self._length else {}).items():
                try:
                    kept = self._rings[name].records() if name in self._rings else backend.flight_records()
                    records[name] = [r.to_json() for r in list(kept)[-self._length :]]
                except Exception as error:  # a backend's own; what the others recorded is worth no less
                    problems[name] = f"{type(error).__name__}: {error}"
        return {
            "purpose": self.key.purpose,
            "ranks": list(self.key.ranks),
            "device": self.key.device,
            "instance": self._instance,
            "rank": self._rank,
            "plan": self._plan,
            "backends": self._names,
            "state": state or ("failed" if self.faulted else "open"),
            "fault": self._fault,
            "records": records,
            "problems": problems,
        }
