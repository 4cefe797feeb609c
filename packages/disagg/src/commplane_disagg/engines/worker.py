"""Transfers through a library that works in the calling thread: one thread for each peer does the calls, another keeps deadlines.

The library's own calls may block for as long as a peer is stopped. A ticket ends in time all the same, and the peer counts as
lost; the call goes on until the library gives up, which is why such engines do not declare the capability ``quiet``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar

from commplane_disagg.engines.base import Ends
from commplane_disagg.engines.pieces import Pieces

__all__ = ["PeerWorker", "Piece", "Stop"]

Piece = tuple[int, int, int]
"""Local offset, remote offset, bytes."""

_MOST_BATCH = 16 << 20
"""Bytes handed to the library at once: how far a cancelled transfer still goes, and what has to arrive within the timeout."""
_MOST_PIECES = 1024


class Stop(Exception):
    """What a `move` raises when its peer is gone; the text is the error of its tickets."""


class PeerWorker:
    """Does the transfers to one peer, in order.

    Args:
        peer: its name.
        move: ``move(pieces, alive)`` writes pieces and returns when they are in the peer's pool; raises `Stop` where they cannot
            be. It may ask ``alive()`` while it waits, and has to return or raise soon after the answer is no.
        ends: of the engine.
        timeout: seconds without progress after which the peer counts as lost.
    """

    thread_prefix: ClassVar[str] = "commplane-engine"

    def __init__(
        self, peer: str, move: Callable[[Sequence[Piece], Callable[[], bool]], None], ends: Ends, timeout: float
    ) -> None:
        self.peer = peer
        self.why_lost: str | None = None
        self._move = move
        self._ends = ends
        self._timeout = timeout
        self._changed = threading.Condition()
        self._queue: deque[tuple[int, Pieces]] = deque()
        self._current: int | None = None
        self._cancelled: set[int] = set()
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"{self.thread_prefix} {peer}", daemon=True)
        self._watch = threading.Thread(target=self._keep_deadlines, name=f"{self.thread_prefix}-watch {peer}", daemon=True)
        self._thread.start()
        self._watch.start()

    def start(self, ticket: int, pieces: Pieces) -> None:
        """Queue a transfer."""
        with self._changed:
            if self.why_lost is None:
                if self._current is None and not self._queue:
                    self._progress = time.monotonic()
                self._queue.append((ticket, pieces))
                self._changed.notify_all()
                return
        self._ends.end(ticket, self.why_lost)

    def cancel(self, ticket: int) -> None:
        """At once if it waits; else between two batches."""
        with self._changed:
            waiting = len(self._queue)
            self._queue = deque(entry for entry in self._queue if entry[0] != ticket)
            if ticket == self._current:
                self._cancelled.add(ticket)
            if len(self._queue) == waiting:
                return
        self._ends.end(ticket, "cancelled: nothing was written")

    def lose(self, why: str) -> None:
        """End the peer's tickets; the thread ends when the library lets it. Idempotent."""
        with self._changed:
            if self.why_lost is not None:
                return
            self.why_lost = why
            self._queue.clear()
            self._changed.notify_all()
        self._ends.end_all(self.peer, why)

    def join(self, timeout: float) -> bool:
        """Whether the threads have ended within `timeout` seconds. After `lose`."""
        until = time.monotonic() + timeout
        self._thread.join(timeout)
        self._watch.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive() and not self._watch.is_alive()

    def _is_wanted(self) -> bool:
        return self.why_lost is None and self._current not in self._cancelled

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.wait_for(lambda: self._queue or self.why_lost is not None)
                if self.why_lost is not None:
                    return
                ticket, pieces = self._queue.popleft()
                self._current = ticket
            try:
                finished = self._transfer(pieces)
            except Stop as error:
                self._ends.end(ticket, str(error))
                self.lose(str(error))
                return
            self._ends.end(ticket, None if finished else "cancelled: what was written stays written")
            self._cancelled.discard(ticket)

    def _transfer(self, pieces: Pieces) -> bool:
        batch: list[Piece] = []
        total = 0
        for piece in pieces.joined(_MOST_BATCH):
            if batch and (total + piece[2] > _MOST_BATCH or len(batch) == _MOST_PIECES):
                if not self._is_wanted():
                    return False
                self._move_batch(batch)
                batch, total = [], 0
            batch.append(piece)
            total += piece[2]
        if not self._is_wanted():
            return False
        self._move_batch(batch)
        return True

    def _move_batch(self, batch: Sequence[Piece]) -> None:
        self._move(batch, lambda: self.why_lost is None)
        self._progress = time.monotonic()

    def _keep_deadlines(self) -> None:
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self.why_lost is not None, min(0.25, self._timeout / 8)):
                    return
                silent = self._current is not None and time.monotonic() - self._progress > self._timeout
            if silent:
                self.lose(
                    f"peer {self.peer!r} is lost: nothing reached it for {self._timeout:g} s, it is stopped or the network "
                    f"between is down"
                )
                return
