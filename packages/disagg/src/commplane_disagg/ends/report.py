"""What `step` tells an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from commplane.errors import CommplaneError

__all__ = ["LentPages", "Report", "RoomResult"]


@dataclass(frozen=True)
class RoomResult:
    """How a room ended: the same on all ranks of the group, in the same step.

    Attributes:
        room: its number.
        generation: which use of that number.
        error: None for success. `PeerError` for a lost peer or a deadline, `UnsupportedOperation` where the two sides do not fit,
            else `CommplaneError`; the text names the first cause and the rank it happened on.
    """

    room: int
    generation: int
    error: CommplaneError | None = None

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return self.error is None


@dataclass(frozen=True)
class LentPages:
    """A room's pages of this rank's pool, in the order in which they were given."""

    room: int
    generation: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What one step came to. Lists are equal on all ranks of the group, but for who speaks in an error and the numbers of pages.

    Attributes:
        results: rooms that ended.
        released: pages that are the engine's again. Until then they are the end's, also after a failure. Never
            before the room's result; after it, the room takes no calls.
        quarantined: pages of failed rooms that stay away until it is proved that no write can land; they may be released later.
    """

    results: list[RoomResult] = field(default_factory=list)
    released: list[LentPages] = field(default_factory=list)
    quarantined: list[LentPages] = field(default_factory=list)
