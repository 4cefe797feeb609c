"""The engine of the demo on one rank: a scheduler that serves a stream of conversations, one step after the other.

Every rank runs the same scheduler over the same stream. What a rank does in a step depends on the stream, on answers, which
are equal on all ranks, and on what the cache says, which has been agreed; never on a clock or on a pool of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from commplane.demo import PagedKV, Transformer
from commplane_cache.demo.stream import Conversations, Turn

__all__ = ["Engine", "NoCache", "Pages", "Running"]


@dataclass
class Running:
    """One request while it is served.

    Attributes:
        name: equal on all ranks, unique in a pass.
        prompt: its tokens.
        room: tokens that it will have in the pages: the prompt, and the answer but for its last token.
        pages: of the device pool of this rank, in order, with room for all of its tokens once it may be computed.
        start: prompt tokens whose keys and values are in the pages already.
        device, host, storage: prompt tokens that came from there.
    """

    turn: Turn
    name: str
    prompt: list[int]
    room: int
    admitted: float
    pages: list[int] = field(default_factory=list)
    start: int = 0
    device: int = 0
    host: int = 0
    storage: int = 0
    answer: list[int] = field(default_factory=list)
    first: float = 0.0

    def row(self, now: float) -> dict[str, Any]:
        """As `commplane_cache.demo.report.Request` wants it."""
        return {
            "conversation": self.turn.conversation,
            "number": self.turn.number,
            "prompt": len(self.prompt),
            "answer": self.answer,
            "computed": len(self.prompt) - self.start,
            "device": self.device,
            "host": self.host,
            "storage": self.storage,
            "first": self.first - self.admitted,
            "total": now - self.admitted,
        }


class Pages(Protocol):
    """Where requests get their pages from: without the cache, or from it."""

    def step(self) -> None:
        """At the start of every step of the scheduler. Collective if there is a cache."""

    def admit(self, request: Running) -> None:
        """A request is to be served."""

    def ready(self, request: Running) -> bool:
        """Whether it may be computed; then its `pages`, `start` and where they came from are set. Equal on all ranks."""

    def computed(self, request: Running) -> None:
        """Its prompt is computed; its `pages` may change for others with the same bytes."""

    def done(self, request: Running) -> None:
        """It is answered: its pages may be used for others."""

    def finish(self) -> None:
        """All requests are answered; steps go on until nothing is `busy`."""

    def busy(self) -> bool:
        """Whether something is still on its way, so that there must be more steps. Equal on all ranks."""


class NoCache:
    """Pages from a free list; nothing is kept.

    Args:
        capacity: pages of the pool.
        page_tokens: tokens in a page of the group: those of a page of the pool, times the context-parallel ranks.
    """

    def __init__(self, capacity: int, page_tokens: int) -> None:
        self._free, self._page_tokens = list(range(capacity)), page_tokens

    def step(self) -> None:
        """There is nothing to agree on."""

    def admit(self, request: Running) -> None:
        """It waits for pages."""

    def ready(self, request: Running) -> bool:
        """Whether there were enough free pages."""
        count = -(-request.room // self._page_tokens)
        if len(self._free) < count:
            return False
        request.pages, self._free = self._free[:count], self._free[count:]
        return True

    def computed(self, request: Running) -> None:
        """Nobody else uses its pages."""

    def done(self, request: Running) -> None:
        """Back to the free list."""
        self._free += request.pages

    def finish(self) -> None:
        """There is nothing to keep."""

    def busy(self) -> bool:
        """Never."""
        return False


class Engine:
    """Serves a stream once. Collective over the ranks of the model.

    Args:
        model: this rank's part.
        pool: this rank's pages on the device.
        pages: who gives them out.
        batch: requests that are served at the same time.
        answer: tokens that are decoded for each.

    Attributes:
        steps: of the scheduler so far.
        seconds: from the first step to the last answer.
    """

    def __init__(self, model: Transformer, pool: PagedKV, pages: Pages, *, batch: int, answer: int) -> None:
        self._model, self._pool, self._pages, self._batch, self._answer = model, pool, pages, batch, answer
        self.steps, self.seconds = 0, 0.0

    def serve(
        self, turns: Sequence[Turn], talk: Conversations, progress: Callable[[int, int], None] = lambda _done, _of: None
    ) -> list[dict[str, Any]]:
        """Serve all turns, in order of arrival: a row for each, in that order."""
        waiting, running = deque(turns), list[Running]()
        rows: dict[Turn, dict[str, Any]] = {}
        idle, start = 0, time.perf_counter()
        while len(rows) < len(turns) or self._pages.busy():
            self.steps += 1
            self._pages.step()
            while waiting and len(running) < self._batch and talk.ready(waiting[0]):
                running.append(self._admitted(waiting.popleft(), talk))
            moved = [self._advance(request) for request in running]
            for request in [r for r in running if len(r.answer) == self._answer]:
                rows[request.turn] = request.row(time.perf_counter())
                talk.answer(request.turn, request.answer)
                self._pages.done(request)
                running.remove(request)
                progress(len(rows), len(turns))
                if len(rows) == len(turns):
                    self.seconds = time.perf_counter() - start
                    self._pages.finish()
            idle = 0 if any(moved) else idle + 1
            if idle:
                # All wait for storage, or nothing is left but writes: give it the core. Longer and longer, at most 2 ms.
                time.sleep(min(0.002, 0.0001 * idle))
        return [rows[turn] for turn in turns]

    def _admitted(self, turn: Turn, talk: Conversations) -> Running:
        prompt, now = talk.prompt(turn), time.perf_counter()
        request = Running(turn, f"{turn.conversation}.{turn.number}", prompt, len(prompt) + self._answer - 1, now)
        self._pages.admit(request)
        return request

    def _advance(self, request: Running) -> bool:
        """One unit of work for a request: its prefill, or one token. False if it has to wait."""
        if request.answer:
            position = len(request.prompt) + len(request.answer) - 1
            request.answer.append(self._model.decode(request.answer[-1], position, self._pool, request.pages))
            return True
        if not self._pages.ready(request):
            return False
        request.answer.append(self._model.prefill(request.prompt, self._pool, request.pages, request.start))
        request.first = time.perf_counter()
        self._pages.computed(request)
        return True
