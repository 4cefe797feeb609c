"""One line of a flight recorder: what a call of a collective was, and how far it came."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["FlightRecord"]


@dataclass(frozen=True)
class FlightRecord:
    """A call of one collective on one rank.

    Attributes:
        seq: number of the call on its backend in its communicator, from 1; the same call has the same number on every rank.
        collective: its name, such as ``"all_reduce"``.
        op: the reduction, or None.
        dtype: name of the dtype, or None.
        nbytes: bytes of this rank's tensor.
        state: ``"running"``, ``"done"`` or ``"failed"``.
        started_ns: when it began, in nanoseconds of CLOCK_MONOTONIC.
        finished_ns: when it ended, or None while it runs.
        waiting_for: group ranks that had not arrived when this was read; empty where the backend cannot tell.
        detail: more, for people.
    """

    seq: int
    collective: str
    op: str | None
    dtype: str | None
    nbytes: int
    state: str
    started_ns: int
    finished_ns: int | None = None
    waiting_for: tuple[int, ...] = ()
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names."""
        return asdict(self)
