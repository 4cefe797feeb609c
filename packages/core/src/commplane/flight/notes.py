"""What plugins note of the rounds of one group, for the dumps: the last so many decisions of this rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Any

__all__ = ["RoundNotes"]

# Until the recorder says how many; as many as the default of the setting `flight_records`.
_LENGTH = 512


class RoundNotes:
    """The last notes of one sync round on this rank, each with its number and the step in whose wake it was made.

    One thread notes; any thread may read, because a deque is copied without letting go of the interpreter lock.

    Attributes:
        step: rounds completed; kept by the round.
        closed: whether the round was closed; set by the round.
    """

    __slots__ = ("_count", "_left", "_rank", "_ring", "closed", "name", "ranks", "step")

    def __init__(self, name: str, ranks: Sequence[int], rank: int) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.step = 0
        self.closed = False
        self._rank = rank
        self._count = count(1)
        self._ring: deque[tuple[int, int, str, tuple[int, ...]]] = deque(maxlen=_LENGTH)
        self._left: list[tuple[int, int, str, tuple[int, ...]]] | None = None

    def hold(self, length: int) -> None:
        """Hold so many notes from now on; with 0, none."""
        self._ring = deque(self._ring, maxlen=length)

    def add(self, what: str, numbers: tuple[int, ...]) -> None:
        """Note something; nothing is formatted before a dump."""
        self._ring.append((next(self._count), self.step, what, numbers))

    def fail(self) -> None:
        """The round after `step` failed here. What is noted from now on is this rank's alone, and not shown. Idempotent."""
        if self._left is None:
            self._left = list(self._ring)

    @property
    def failed(self) -> bool:
        """Whether a round failed here: this rank noted all that it had to after `step`."""
        return self._left is not None

    def last(self) -> list[tuple[int, int, str]]:
        """Number, step and text of the notes held, oldest first."""
        held = list(self._ring) if self._left is None else self._left
        return [(number, step, " ".join([what, *map(str, numbers)])) for number, step, what, numbers in held]

    def to_json(self, instance: int) -> dict[str, Any]:
        """What a dump says of the round, which is the how many-th of its name and ranks. Local, from any thread."""
        return {
            "name": self.name,
            "ranks": list(self.ranks),
            "instance": instance,
            "rank": self._rank,
            "steps": self.step,
            "failed": self.failed,
            "notes": self.last(),
        }
