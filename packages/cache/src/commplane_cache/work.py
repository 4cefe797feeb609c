"""Work on its way, in queues that all ranks drain alike.

Copies and writes are started in the same order on every rank and end at other times on each. A rank votes how many from the
head of the queue have ended, and how many of those went well; the smallest number of each is agreed. Failed work has ended, too:
a rank that could not do it still counts it, or the others would wait for it for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from commplane_cache.tiers import CopyEvent
from commplane_cache.tree import Node

__all__ = ["Work", "WorkQueue"]


class Work:
    """One copy or write of a run of pages, which may have been split meanwhile.

    Attributes:
        nodes: whose pages these are.
        pages: how many pages move.
        error: why it failed here, or None.
        event: says when it has ended here, where `end` is not called.
        orphans: pages that it fills and that no node wants any more; freed once all ranks have ended it.
        agreed: whether it went well on all ranks; None until that is agreed.
        leaves: it is a write of what then leaves the device.
    """

    __slots__ = ("_ended", "agreed", "error", "event", "leaves", "nodes", "orphans", "pages")

    def __init__(self, nodes: list[Node], pages: int) -> None:
        self.nodes = nodes
        self.pages = pages
        self.orphans: list[np.ndarray] = []
        self.agreed: bool | None = None
        self.event: CopyEvent | None = None
        self.error: str | None = None
        self.leaves = self._ended = False

    def end(self, error: str | None = None) -> None:
        """It has ended on this rank."""
        self.error, self._ended, self.event = error, True, None

    def ended(self) -> bool:
        """Whether it has ended on this rank."""
        if self.event is not None:
            try:
                over = self.event.query()
            except Exception as error:  # a copy that failed on its way; the other ranks are told by the vote
                self.end(f"{type(error).__name__}: {error}")
            else:
                if over:
                    self.end()
        return self._ended


class WorkQueue:
    """Work of one kind, in the order in which it was started: the same on all ranks.

    Attributes:
        pages: of all of it.
    """

    __slots__ = ("_work", "pages")

    def __init__(self) -> None:
        self._work: deque[Work] = deque()
        self.pages = 0

    def __len__(self) -> int:
        return len(self._work)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._work)

    def add(self, work: Work) -> None:
        """Started, on all ranks at this place of the order."""
        self._work.append(work)
        self.pages += work.pages

    def vote(self) -> tuple[int, int]:
        """How many from the head have ended here, and how many of these, before the first failure, went well."""
        ended = good = 0
        for work in self._work:
            if not work.ended():
                break
            if good == ended and work.error is None:
                good += 1
            ended += 1
        return ended, good

    def drain(self, ended: int, good: int) -> list[Work]:
        """Take what all ranks have ended, and say in `Work.agreed` whether it went well on all.

        Args:
            ended: the smallest first number of the votes.
            good: the smallest second number. The one after these has failed somewhere; of those behind it nothing is known yet.
        """
        count = ended if good >= ended else good + 1
        done = [self._work.popleft() for _ in range(count)]
        for i, work in enumerate(done):
            work.agreed = i < good
            self.pages -= work.pages
        return done
