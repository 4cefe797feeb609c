"""One prefetch: its state, which only agreed values move, and what this rank's storage has done for it so far."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import numpy as np

from commplane_cache.prefetch.policy import PrefetchPolicy
from commplane_cache.storage import StoreLink
from commplane_cache.tree import Node, TokenRun

__all__ = ["CAN_END", "DROP", "KEEP", "OVER", "RUNNING", "Prefetch", "State"]

RUNNING, CAN_END, OVER = range(3)
"""A rank's vote on a prefetch; the smallest counts: it goes on; it may end; its I/O has ended here."""

KEEP, DROP = 1, 2
"""A rank's vote to stop; the largest counts: because it failed here, what all have is kept; because the request was aborted."""


class State(str, Enum):
    """Equal on all ranks.

    .. code-block:: text

        QUEUED -> QUERYING -> HIT_AGREED -> ALLOCATED -> LOADING -> STOPPING -> COMMITTED
                     |            |                         |          |
                     +-> REVOKED <+                         +----------+-> RELEASED   (aborted)
    """

    QUEUED = "queued"
    QUERYING = "querying"
    HIT_AGREED = "hit_agreed"
    ALLOCATED = "allocated"
    LOADING = "loading"
    STOPPING = "stopping"
    REVOKED = "revoked"
    COMMITTED = "committed"
    RELEASED = "released"

    @property
    def final(self) -> bool:
        """The request need not wait any more. I/O may still be on its way."""
        return self in _FINAL


_FINAL = frozenset((State.REVOKED, State.COMMITTED, State.RELEASED))


class Prefetch:
    """One prefetch.

    Attributes:
        seq: its number; equal on all ranks, like `state`, `run`, `start`, `hit`, `pages`, `committed`.
        request: whose it is.
        start: pages before the first one asked for; the tree has them.
        anchor: the node that ends there, pinned; None for the root.
        state: see `State`.
        wanted: this rank's scheduler asked for the request, so it waits; at `wanted_at` for the first time.
        hit: pages that all ranks have in storage, once agreed.
        pages: host pages, once allocated.
        committed: pages that went into the tree.
        found: this rank's answer: pages that its storage has; -1 while it is not there.
        done: pages from the first on that have been read here.
        frozen: what `done` was when the prefetch was stopped: what came later is not counted.
        stop: this rank's wish to stop: 0, `KEEP` or `DROP`.
    """

    __slots__ = (
        "_batch",
        "_busy",
        "_ended",
        "_link",
        "_policy",
        "_total",
        "anchor",
        "committed",
        "done",
        "error",
        "found",
        "frozen",
        "hit",
        "pages",
        "request",
        "run",
        "seq",
        "start",
        "state",
        "stop",
        "wanted",
        "wanted_at",
    )

    def __init__(
        self,
        seq: int,
        request: object,
        run: TokenRun,
        start: int,
        anchor: Node | None,
        link: StoreLink,
        policy: PrefetchPolicy,
        batch: int,
    ) -> None:
        self.seq, self.request, self.run, self.start, self.anchor = seq, request, run, start, anchor
        self._link, self._policy, self._batch = link, policy, batch
        self.state = State.QUEUED
        self.wanted, self.wanted_at = False, 0.0
        self.hit = self.committed = self.done = self.frozen = self.stop = self._total = 0
        self.found = -1
        self.pages: np.ndarray | None = None
        self.error: str | None = None
        self._busy = self._ended = False

    # Local: this rank's storage.

    def query(self) -> None:
        """Ask this rank's storage."""
        self._busy = True
        self._link.exists(self.run.keys(self.start, self.run.pages), self._told_found)

    def read(self) -> None:
        """Read the next batch of `pages`."""
        if self.pages is None or self._busy or self._ended:
            return
        first, last = self.done, min(self.done + self._batch, len(self.pages))
        self._busy = True
        keys = self.run.keys(self.start + first, self.start + last)
        self._link.get(keys, self.pages[first:last], self._told_read)

    def freeze(self) -> None:
        """What is read from now on does not count, and no batch is started any more."""
        self.frozen, self._ended = self.done, True

    def _told_found(self, ok: Sequence[bool], error: str | None) -> None:
        self._busy = False
        self.error = error
        self.found = next((i for i, there in enumerate(ok) if not there), len(ok))

    def _told_read(self, ok: Sequence[bool], error: str | None) -> None:
        self._busy = False
        if self._ended:  # stopped meanwhile
            return
        good = next((i for i, there in enumerate(ok) if not there), len(ok))
        self.done += good
        assert self.pages is not None
        if good < len(ok):
            self._ended = True
            self.error, self.stop = error, max(self.stop, KEEP)
        elif self.done == len(self.pages):
            self._ended = True
        else:
            self.read()

    # Votes.

    def vote(self) -> tuple[int, int, int]:
        """This rank's pages, level and wish to stop; see `commplane_cache.agreed`."""
        state = self.state
        if state is State.LOADING:
            if self._ended and not self._busy:
                return self.done, OVER, self.stop
            return self.done, self._level(len(self.pages) if self.pages is not None else 0), self.stop
        if state is State.QUERYING:
            return self.found, self._level(self.run.pages - self.start), self.stop
        return self.frozen, RUNNING if self._busy else OVER, self.stop

    def can_leave_queue(self) -> bool:
        """Whether it may end here without ever having had a slot: its time is over, or its request was aborted."""
        return self.stop == DROP or self._level(self.run.pages - self.start) == CAN_END

    def _level(self, pages: int) -> int:
        return CAN_END if self.wanted and self._policy.can_end(self.wanted_at, pages) else RUNNING
