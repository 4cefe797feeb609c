"""A submitted batch while it is out: who may touch the caller's buffers, and when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Batch", "Kind", "Part"]

Kind = Literal["exists", "get", "put", "remove"]


@dataclass(eq=False)
class Batch:
    """One submission. Everything but the answers is read and written under `changed`.

    Attributes:
        touching: workers that have the caller's buffers in hand just now. A batch never ends while there is one.
        over: whether its end was told: from then on nobody touches its buffers.
    """

    ticket: int
    kind: Kind
    keys: tuple[bytes, ...]
    pages: tuple[memoryview, ...]
    deadline: float
    changed: threading.Condition
    ok: list[bool] = field(init=False)
    error: str | None = None
    parts_left: int = 0
    touching: int = 0
    over: bool = False

    def __post_init__(self) -> None:
        self.ok = [False] * len(self.keys)


@dataclass(eq=False)
class Part:
    """A piece of a batch, worked on by one thread. Indices count within the part.

    Attributes:
        chosen: for each key of the part its index in the batch; keys that do not fit have been left out.
    """

    batch: Batch
    chosen: Sequence[int]
    keys: list[bytes]
    pages: list[memoryview]

    def enter(self) -> bool:
        """Whether the caller's buffers may be touched; if so, until `leave`."""
        batch = self.batch
        with batch.changed:
            if batch.over:
                return False
            batch.touching += 1
            return True

    def leave(self) -> None:
        """End of what `enter` allowed."""
        batch = self.batch
        with batch.changed:
            batch.touching -= 1
            if batch.deadline <= time.monotonic():
                batch.changed.notify_all()  # somebody may be waiting to end it

    def fill(self, index: int, data: memoryview) -> None:
        """Copy what was read into the caller's buffer and say so, unless the batch is over."""
        if self.enter():
            try:
                self.pages[index][:] = data
                self.done(index)
            finally:
                self.leave()

    def done(self, index: int) -> None:
        """The key of that index is answered with yes."""
        self.batch.ok[self.chosen[index]] = True

    def fail(self, error: str) -> None:
        """Say what went wrong; the first one of a batch is kept."""
        with self.batch.changed:
            if self.batch.error is None:
                self.batch.error = error

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.batch.over
