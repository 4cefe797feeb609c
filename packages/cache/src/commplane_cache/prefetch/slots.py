"""All prefetches of a cache: a fixed number at a time, in slots whose votes are in every round.

Nothing here runs a collective. What every rank calls alike (start) and the agreed values of a round move the states; what
happens on one rank alone (an answer of its storage, its clock, its failures, what its scheduler asks for) is voted on.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from commplane_cache.metrics import Counters
from commplane_cache.prefetch.policy import PrefetchPolicy
from commplane_cache.prefetch.states import CAN_END, DROP, KEEP, OVER, Prefetch, State
from commplane_cache.residency import Residency
from commplane_cache.storage import StoreLink
from commplane_cache.tiers import MOVING
from commplane_cache.tree import Journal, Node, TokenRun

__all__ = ["PrefetchSlots", "Snapshot"]


class Snapshot(NamedTuple):
    """What a round's votes are about: the prefetch and its state in each slot, and those in the queue whose turn it was."""

    slots: tuple[tuple[Prefetch, State] | None, ...] = ()
    queued: tuple[Prefetch, ...] = ()


class PrefetchSlots:
    """The prefetches of one cache.

    Attributes:
        slots: what runs; None where a slot is free.
        queue: what waits for a slot, in the order of the calls.
        requests: the prefetch of each request that has not been told its end on this rank. Which of them have not ended is
            the same on all ranks.
    """

    def __init__(
        self,
        residency: Residency,
        journal: Journal,
        counters: Counters,
        link: StoreLink | None,
        policy: PrefetchPolicy,
        *,
        slots: int,
        batch: int,
        least: int,
    ) -> None:
        self.slots: list[Prefetch | None] = [None] * slots
        self.queue: deque[Prefetch] = deque()
        self.requests: dict[object, Prefetch] = {}
        self._residency, self._journal, self._counters = residency, journal, counters
        self._link, self._policy, self._batch, self._least = link, policy, batch, least
        self._next = 1
        self._used = 0
        self._turn = 0
        self._none = (0,) * slots

    def __len__(self) -> int:
        return self._used + len(self.queue)

    def start(self, request: object, run: TokenRun, start: int, anchor: Node | None) -> bool:
        """Begin for `request` after page `start`; False if that is not worth it, or the request has one already."""
        if self._link is None or run.pages - start < self._least:
            return False
        before = self.requests.get(request)
        if before is not None and not before.state.final:  # one that has ended may have been told so on some ranks only
            return False
        prefetch = Prefetch(self._next, request, run, start, anchor, self._link, self._policy, self._batch)
        self._next += 1
        if anchor is not None:
            anchor.pins += 1
        self.requests[request] = prefetch
        self.queue.append(prefetch)
        self._counters.prefetches += 1
        self._journal.note("prefetch", prefetch.seq, start, run.pages)
        self._fill()
        return True

    def want(self, prefetch: Prefetch) -> None:
        """This rank's scheduler would run the request now. Changes what is voted, nothing else."""
        if not prefetch.wanted:
            prefetch.wanted, prefetch.wanted_at = True, self._policy.now()

    # The round.

    def votes(self) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
        """Pages, levels and wishes to stop, one a slot."""
        if not self._used:
            return self._none, self._none, self._none
        pages, levels, stops = [], [], []
        for prefetch in self.slots:
            a, b, c = (0, 0, 0) if prefetch is None else prefetch.vote()
            pages.append(a)
            levels.append(b)
            stops.append(c)
        return pages, levels, stops

    def vote_queued(self, about: Snapshot) -> Sequence[int]:
        """Which of `about.queued` may end here."""
        if not about.queued:
            return self._none
        votes = [int(prefetch.can_leave_queue()) for prefetch in about.queued]
        return votes + [0] * (len(self.slots) - len(votes))

    def snapshot(self) -> Snapshot:
        """What the votes of now are about: a slot may hold something else, or in another state, when they are agreed.

        Once a round: each has the next ones of the queue.
        """
        slots = tuple(None if p is None else (p, p.state) for p in self.slots) if self._used else ()
        if not self.queue:
            return Snapshot(slots)
        first, size = self._turn % len(self.queue), len(self.slots)
        self._turn = first + size
        around = itertools.chain(itertools.islice(self.queue, first, None), itertools.islice(self.queue, first))
        return Snapshot(slots, tuple(itertools.islice(around, size)))

    def apply(
        self, about: Snapshot, pages: Sequence[int], levels: Sequence[int], stops: Sequence[int], queued: Sequence[int]
    ) -> None:
        """Move all prefetches by what was agreed."""
        for prefetch, may_end in zip(about.queued, queued, strict=False):
            if may_end and prefetch.state is State.QUEUED:
                self.queue.remove(prefetch)
                self._end(prefetch, State.REVOKED)
        for i, entry in enumerate(about.slots):
            if entry is None:
                continue
            prefetch, state = entry
            if stops[i] == DROP and prefetch.state is not State.RELEASED:
                self._abort(prefetch)
            if prefetch.state is state:  # else the votes were about a state that it is not in any more
                self._move(prefetch, pages[i], levels[i], stops[i])
            if levels[i] == OVER and prefetch.state.final:  # all I/O has ended on all ranks, and none can begin
                self._free(i, prefetch)
        if self.queue:
            self._fill()

    def _move(self, prefetch: Prefetch, pages: int, level: int, stop: int) -> None:
        state = prefetch.state
        if state is State.QUERYING:
            if pages >= 0:
                self._counters.storage.hits += pages
                self._counters.storage.misses += prefetch.run.pages - prefetch.start - pages
                self._allocate(prefetch, pages)
            elif stop or level >= CAN_END:
                self._end(prefetch, State.REVOKED)
        elif state is State.LOADING:
            if level == OVER:  # done everywhere, so the pages are the last word
                self._commit(prefetch, pages, failed=stop == KEEP)
            elif stop or level >= CAN_END:
                self._stop(prefetch)
        elif state is State.STOPPING:
            self._commit(prefetch, pages, failed=stop == KEEP)

    def _allocate(self, prefetch: Prefetch, hit: int) -> None:
        prefetch.hit = hit
        self._to(prefetch, State.HIT_AGREED, hit)
        host = self._residency.host
        assert host is not None
        if hit >= self._least and not self._residency.make_host_room(hit):
            hit = host.available
        if hit < self._least:
            self._end(prefetch, State.REVOKED)
            return
        prefetch.pages = host.take(hit, MOVING)
        self._to(prefetch, State.ALLOCATED, hit)
        self._to(prefetch, State.LOADING, hit)
        prefetch.read()

    def _stop(self, prefetch: Prefetch) -> None:
        prefetch.freeze()
        self._to(prefetch, State.STOPPING, 0)

    def _commit(self, prefetch: Prefetch, done: int, *, failed: bool) -> None:
        assert prefetch.pages is not None
        pages, prefetch.pages = prefetch.pages, prefetch.pages[done:]
        prefetch.committed = self._residency.adopt_host(prefetch.run, prefetch.start, pages[:done])
        self._counters.storage.moved += done
        if failed:
            self._counters.storage.failed += len(pages) - done
        self._end(prefetch, State.COMMITTED, prefetch.committed)

    def _abort(self, prefetch: Prefetch) -> None:
        """Dropped on all ranks; its pages stay until its I/O has ended."""
        self._forget(prefetch)
        self._counters.aborted += 1
        if prefetch.state.final:
            self._to(prefetch, State.RELEASED)
            return
        prefetch.freeze()
        self._end(prefetch, State.RELEASED)

    def _end(self, prefetch: Prefetch, state: State, pages: int = 0) -> None:
        """The request need not wait any more."""
        if state is State.REVOKED:
            self._counters.revoked += 1
        self._to(prefetch, state, pages)
        if prefetch.stop == DROP:  # aborted here before it ended so: nobody will ask for it
            self._forget(prefetch)
        if prefetch.anchor is not None:
            prefetch.anchor.pins -= 1
            self._residency.consider(prefetch.anchor)
            prefetch.anchor = None

    def _forget(self, prefetch: Prefetch) -> None:
        if self.requests.get(prefetch.request) is prefetch:  # else the name was used again meanwhile
            del self.requests[prefetch.request]

    def _to(self, prefetch: Prefetch, state: State, pages: int = 0) -> None:
        prefetch.state = state
        self._journal.note(state.value, prefetch.seq, pages)

    def _free(self, slot: int, prefetch: Prefetch) -> None:
        if prefetch.pages is not None:
            assert self._residency.host is not None
            self._residency.host.give_back(prefetch.pages, MOVING)
            prefetch.pages = None
        self.slots[slot] = None
        self._used -= 1
        self._journal.mix(3, prefetch.seq, slot)

    def _fill(self) -> None:
        for slot, held in enumerate(self.slots):
            if not self.queue:
                return
            if held is None:
                prefetch = self.slots[slot] = self.queue.popleft()
                self._used += 1
                self._to(prefetch, State.QUERYING, slot)
                prefetch.query()
