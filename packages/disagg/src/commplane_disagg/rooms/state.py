"""What a room is: the transfer of one request's pages from a prefill group to a decode group, as one rank of either sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from commplane.errors import CommplaneError, PeerError, UnsupportedOperation

__all__ = ["Cause", "Key", "Reason", "Room", "Status"]


class Key(NamedTuple):
    """A room and which use of its number it is: what is late for one generation cannot touch the next."""

    room: int
    generation: int

    def __str__(self) -> str:
        return f"room {self.room} generation {self.generation}"


class Status(IntEnum):
    """Where a room is. A rank's own status only rises; the group's is the least of its ranks', and `FAILED` the least of all."""

    FAILED = 0
    NEW = 1
    """Opened here; nobody was told."""
    BOOTSTRAPPING = 2
    """The two sides find each other."""
    WAITING = 3
    """Both sides know of it; the pages are not computed yet."""
    TRANSFERRING = 4
    SUCCESS = 5
    """Prefill: every receiver acknowledged. Decode: every byte is here."""
    DRAINING = 6
    """Failed; some write may still be under way, so the pages stay where they are."""
    QUARANTINED = 7
    """Failed, and nothing proves that no write can land any more; the pages stay until something does."""
    RELEASED = 8
    """The pages are the caller's again."""


class Reason(IntEnum):
    """Why a room failed. Of several that ranks find in the same step the greatest is told: it is nearest to the root."""

    TIMEOUT = 1
    PEER_LOST = 2
    ABORTED = 3
    ENGINE = 4
    REFUSED = 5

    @property
    def words(self) -> str:
        """For a message."""
        return {1: "deadline", 2: "peer lost", 3: "aborted", 4: "transfer engine", 5: "refused"}[self.value]

    def error(self, text: str) -> CommplaneError:
        """The error of a room that failed for this reason."""
        if self in (Reason.TIMEOUT, Reason.PEER_LOST):
            return PeerError(text)
        return UnsupportedOperation(text) if self is Reason.REFUSED else CommplaneError(text)


@dataclass(frozen=True)
class Cause:
    """The first thing that went wrong with a room.

    Attributes:
        reason: of which kind it is.
        origin: the end it happened to, of this side or the other.
        text: one sentence.
    """

    reason: Reason
    origin: str
    text: str


@dataclass(eq=False)
class Room:
    """One room on one rank.

    Attributes:
        key: its number and generation.
        status: what the group agreed on; the only one to be shown.
        local: this rank's own status, at most SUCCESS.
        cause: why it failed here, or was told to have failed; stays as it was first found. Of a room that another rank failed it
            has no origin until that rank's text is known.
        drained: failed, and no write of it can land any more, as far as this rank knows.
        stuck: failed, not drained, and waiting longer is of no use.
        error: for all ranks the same but for who speaks; set with the agreed failure's text.
        data: of the end that drives it.
    """

    key: Key
    status: Status = Status.NEW
    local: Status = Status.NEW
    cause: Cause | None = None
    drained: bool = False
    stuck: bool = False
    error: CommplaneError | None = None
    data: Any = field(default=None, repr=False)

    @property
    def is_failing(self) -> bool:
        """Whether this rank knows that it failed, agreed or not: nothing new may be started for it."""
        return self.cause is not None

    @property
    def is_explained(self) -> bool:
        """Whether it failed and the cause is known, so that others can be told."""
        return self.cause is not None and bool(self.cause.origin)

    def advance(self, status: Status) -> None:
        """Raise this rank's own status; a lower one is ignored, so is any after a failure."""
        if self.cause is None and status > self.local:
            self.local = status

    def fail(self, cause: Cause) -> bool:
        """Give it up on this rank, which fails it on all. False if it had failed before, or was agreed to have succeeded."""
        if self.cause is not None or self.status >= Status.SUCCESS or self.status is Status.FAILED:
            return False
        self.cause = cause
        return True
