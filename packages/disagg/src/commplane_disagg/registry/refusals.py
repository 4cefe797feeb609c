"""Why the registry says no. Each becomes one HTTP status and one `Problem`."""

from __future__ import annotations

from collections.abc import Mapping

from commplane_disagg.wire import Problem

__all__ = [
    "BadAddress",
    "Claimed",
    "Full",
    "NotFound",
    "OutOfGrid",
    "Refusal",
    "RoomConflict",
    "Stale",
    "TopologyConflict",
    "UnknownRow",
]


class Refusal(Exception):
    """The root. `status` is HTTP's, `code` the word in `Problem`."""

    status = 400
    code = "malformed"

    def __init__(
        self, message: str, difference: Mapping[str, tuple[str, str]] | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.problem = Problem(code=self.code, message=message, difference=dict(difference or {}), retry_after=retry_after)


class BadAddress(Refusal):
    """A host that no peer could reach."""

    status, code = 422, "address"


class OutOfGrid(Refusal):
    """A key that the declared topology does not have."""

    status, code = 422, "grid"


class TopologyConflict(Refusal):
    """Another topology than the rows that are there declared."""

    status, code = 409, "topology"


class Claimed(Refusal):
    """The row is held by another instance, whose lease runs."""

    status, code = 409, "claimed"


class Stale(Refusal):
    """From an instance that was replaced, or of an epoch that is over."""

    status, code = 409, "stale"


class RoomConflict(Refusal):
    """A room that is served by another data-parallel rank already."""

    status, code = 409, "room"


class UnknownRow(Refusal):
    """No such row: never registered here, expired, or this registry was restarted. The answer is to register."""

    status, code = 404, "unknown_row"


class NotFound(Refusal):
    """No such group or route."""

    status, code = 404, "not_found"


class Full(Refusal):
    """A limit of the registry is reached."""

    status, code = 429, "full"
