"""What all ranks are told alike: requests with shared prefixes, their order, when they end and which are aborted."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np

from commplane_cache.tree import TokenRun

__all__ = ["Job", "Step", "Workload"]

PAGE_TOKENS = 2


@dataclass(eq=False)
class Job:
    """A request.

    Attributes:
        name: its number.
        run: its prompt.
        marks: what each of its pages must hold: 8 bytes made from all tokens up to there.
        priority: for eviction.
        idle: steps until its turn may come.
        steps: how long it runs once it was let in.
        more: pages that it takes while it runs and that never go into the tree.
    """

    name: int
    run: TokenRun
    marks: np.ndarray
    priority: int
    idle: int
    steps: int
    more: int


@dataclass
class Step:
    """What happens in one step: requests that come, and those that are aborted with the steps until each rank hears of it."""

    arrivals: list[Job] = field(default_factory=list)
    aborts: list[tuple[Job, list[int]]] = field(default_factory=list)


class Workload:
    """Steps drawn from a seed."""

    def __init__(self, seed: int, ranks: int, *, arrive: float, abort: float) -> None:
        self._random = random.Random(f"workload {seed}")
        self._ranks, self._arrive, self._abort = ranks, arrive, abort
        self._known: list[list[int]] = [self._tokens(4, 12) for _ in range(4)]
        self._recent: list[Job] = []
        self._next = 0

    def _tokens(self, least: int, most: int) -> list[int]:
        return [self._random.randrange(50) for _ in range(self._random.randint(least, most))]

    def step(self) -> Step:
        """The next one."""
        draw, step = self._random, Step()
        if draw.random() < self._arrive:
            step.arrivals.append(self._job())
        if self._recent and draw.random() < self._abort:
            step.aborts.append((draw.choice(self._recent), [draw.choice((0, 0, 1, 3)) for _ in range(self._ranks)]))
        return step

    def _job(self) -> Job:
        draw = self._random
        before = draw.choice(self._known)
        tokens = before[: draw.randint(1, len(before))] + self._tokens(1, 10)
        if draw.random() < 0.6:
            self._known.append(tokens[:48])
            if len(self._known) > 40:
                del self._known[draw.randrange(len(self._known))]
        self._next += 1
        run = TokenRun(tokens, PAGE_TOKENS, salt=b"adapter" if draw.random() < 0.1 else b"")
        marks = np.array([int.from_bytes(key[:8], "little", signed=True) for key in run.keys(0, run.pages)], np.int64)
        job = Job(self._next, run, marks, draw.randrange(3), draw.choice((0, 0, 2, 6, 12)), draw.randint(1, 6), draw.randrange(2))
        self._recent = [*self._recent[-5:], job]
        return job
