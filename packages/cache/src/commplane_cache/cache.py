"""The cache as an engine calls it.

Every rank of the group makes the same calls in the same order between two steps: requests and their order come to an engine's
ranks from one scheduler anyway. What each rank finds for itself (its storage, its clock, its free memory, a copy that failed)
becomes a vote of `step`, the only collective, which every rank runs once in every scheduler step whether it has work or not.

.. code-block:: python

    cache.step()                                   # once a scheduler step
    run = TokenRun(prompt, page_tokens)
    known = cache.match(run)
    cache.prefetch(request, run, known)            # when the request arrives: what storage has after that
    if cache.check_prefetch_progress(request):     # when its turn comes
        known = cache.match(run)
        cache.load_back(known)                     # what the host has; on the device some steps later
        cache.lock(known.device_node)
        own = cache.allocate(pages)                # None: no room now, try again after a step
        ...                                        # compute into `own`
        done = cache.insert(run, own, start=known.device)
        cache.lock(done.node), cache.unlock(known.device_node)
        ...                                        # at its end
        cache.unlock(done.node)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from commplane.api import Agreed, PageStore, SyncRound
from commplane.errors import CommplaneError, CommunicatorError, ConfigError
from commplane_cache.agreed import ENDED, FREE, GOOD, LEVEL, PAGES, QUEUED, STOP, check_fields, vector
from commplane_cache.audit import audit
from commplane_cache.metrics import Counters
from commplane_cache.options import CacheOptions
from commplane_cache.prefetch import PrefetchSlots, State, policy_of
from commplane_cache.prefetch.slots import Snapshot
from commplane_cache.prefetch.states import DROP
from commplane_cache.residency import Residency
from commplane_cache.results import Drained, Inserted, Match
from commplane_cache.storage import StoreLink
from commplane_cache.tiers import HELD, OWNERS, Copier, HostTier, Pool
from commplane_cache.tree import Journal, Node, RadixTree, TokenRun
from commplane_cache.tree.journal import Decision
from commplane_cache.work import Work

__all__ = ["Drained", "Inserted", "Match", "PrefixCache"]


class PrefixCache:
    """One rank's end of a prefix cache. Not thread-safe: the scheduler's thread calls it.

    Making one is local. Before the first agreed step there are no pages to give: how many, the round with the fewest decides.

    Args:
        rounds: from ``plane.sync_round(..., specs=["cache"])``: of the spec that this wheel registers, or of `cache_sync_spec`,
            and no other; the cache runs it, the caller closes it.
        device_pages: pages that the engine has on the device for the cache; it alone gives them away.
        host: host tier, or None.
        store: an open page store, or None; wants a host tier. The caller closes it, after the cache.
        copier: copies between device and host; needed with a host tier.
        options: settings; equal on all ranks.
        clock: seconds, for timeouts of this rank.

    Attributes:
        counters: what it has done; see `commplane_cache.metrics`.
        tree: the radix tree, to look at.
    """

    def __init__(
        self,
        rounds: SyncRound,
        device_pages: int,
        host: HostTier | None = None,
        store: PageStore | None = None,
        *,
        copier: Copier | None = None,
        options: CacheOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options = options or CacheOptions()
        if host is not None and copier is None:
            raise ConfigError("cache: a host tier wants a copier that knows the device memory; see commplane_cache.tiers")
        if store is not None and host is None:
            raise ConfigError("cache: storage wants a host tier that its pages pass through")
        check_fields(rounds, options.prefetch_slots)
        self._rounds = rounds
        self._journal = journal = Journal(options.decisions, rounds.note)
        self.counters = Counters()
        self.tree = RadixTree(options.page_tokens, journal, names=store is not None)
        self._device = Pool("device", device_pages)
        self._host = None if host is None else Pool("host", host.pages)
        self._link = None if store is None or host is None else StoreLink(store, host, writer=options.writer)
        self._residency = Residency(
            self.tree,
            journal,
            self.counters,
            self._device,
            self._host,
            copier,
            self._link,
            policy=options.evict,
            write_back=options.write == "write_back",
        )
        policy = policy_of(
            options.prefetch,
            clock,
            base=options.timeout_base,
            per_1024_tokens=options.timeout_per_1024_tokens,
            most=options.timeout_most,
            page_tokens=options.page_tokens,
        )
        self._prefetches = PrefetchSlots(
            self._residency,
            journal,
            self.counters,
            self._link,
            policy,
            slots=options.prefetch_slots,
            batch=options.prefetch_batch_pages,
            least=options.prefetch_least_pages,
        )
        # Ranks with other settings, or without storage, would come to other decisions some time: their first round says so.
        journal.mix(options.digest(), host is not None, store is not None)
        self._through = options.write == "write_through"
        self._selective = options.selective_hits if options.write == "write_through_selective" else 0
        self._voted = (0, 0)
        self._about = Snapshot()
        self._agreed: Agreed | None = None
        self._out = False
        self._drained = Drained()

    # The round.

    def step(self) -> Drained:
        """Once in every scheduler step, on every rank: vote, and do what all agreed on. Collective.

        With ``pipelined`` it does what was voted on in the step before, and votes for the next one.

        Raises:
            MismatchError: the ranks' trees, or their calls, differ. The cache cannot be used any more.
            PeerError: a rank is missing at the deadline; it is named. The cache cannot be used any more.
        """
        if not self.options.pipelined:
            values = self._votes()
            try:
                agreed = self._rounds.step(values, digest=self._journal.digest)
            except CommunicatorError as error:
                self._add_decisions(error)
                raise
            return self._apply(agreed)
        drained = self.result() if self._out else Drained()
        self.issue()
        return drained

    def issue(self) -> None:
        """Vote, and do not wait: the first half of `step`, for engines that place the halves themselves. Local."""
        if self._out:
            raise CommplaneError("cache: a round is out already: read its result before the next one is issued")
        self._rounds.issue(self._votes(), digest=self._journal.digest)
        self._out = True

    def result(self) -> Drained:
        """Do what all agreed on in the round that `issue` sent: the second half of `step`. Collective. Raises as `step`."""
        if not self._out:
            raise CommplaneError("cache: no round is out: issue one before its result is read")
        try:
            agreed = self._rounds.result()
        except CommunicatorError as error:
            self._add_decisions(error)
            raise
        self._out = False
        return self._apply(agreed)

    def _add_decisions(self, error: CommunicatorError) -> None:
        """The last decisions as a note of `error`, where Python has notes: what to compare between the logs of ranks."""
        if hasattr(error, "add_note"):
            last = "; ".join(f"{d.number} {d.what} {d.numbers}" for d in self.decisions()[-8:])
            error.add_note(f"the cache's last decisions, after {self._journal.step} rounds: {last or 'none'}")

    def _votes(self) -> dict[str, Sequence[int]]:
        residency, prefetches = self._residency, self._prefetches
        if self._link is not None:
            self._link.poll()
        writes, loads, puts = residency.writes.vote(), residency.loads.vote(), residency.puts.vote()
        pages, levels, stops = prefetches.votes()
        self._about = prefetches.snapshot()
        self._voted = (self._device.free, 0 if self._host is None else self._host.free)
        return {
            FREE: self._voted,
            ENDED: (writes[0], loads[0], puts[0]),
            GOOD: (writes[1], loads[1], puts[1]),
            QUEUED: prefetches.vote_queued(self._about),
            PAGES: pages,
            LEVEL: levels,
            STOP: stops,
        }

    def _apply(self, agreed: Agreed) -> Drained:
        self._agreed = agreed
        self._journal.step += 1
        self._residency.promised = 0
        self.counters.rounds += 1
        free = vector(agreed, FREE)
        self._device.surplus = self._voted[0] - free[0]
        if self._host is not None:
            self._host.surplus = self._voted[1] - free[1]
        return self.drain_storage_control_queues()

    def drain_storage_control_queues(self) -> Drained:
        """Do what the last round agreed on: what it drains from the queues of copies, writes and prefetches. Local.

        `step` calls it; a second call for the same round does nothing and says the same.
        """
        agreed, self._agreed = self._agreed, None
        if agreed is None:
            return self._drained
        ended, good = vector(agreed, ENDED), vector(agreed, GOOD)
        residency = self._residency
        self._drained = Drained(
            residency.drain_writes(ended[0], good[0]) if ended[0] else 0,
            residency.drain_loads(ended[1], good[1]) if ended[1] else 0,
            residency.drain_puts(ended[2], good[2]) if ended[2] else 0,
        )
        levels, stops = vector(agreed, LEVEL), vector(agreed, STOP)
        self._prefetches.apply(self._about, vector(agreed, PAGES), levels, stops, vector(agreed, QUEUED))
        return self._drained

    # Prefixes.

    def match(self, run: TokenRun, *, priority: int = 0, again: bool = False) -> Match:
        """What the cache has of `run`, from its start. Counts as a use. Local; the same on all ranks.

        Args:
            run: its pages must be of `CacheOptions.page_tokens`.
            priority: of the request, for eviction by priority.
            again: for the same request, such as after a load: not counted once more.
        """
        if run.page_tokens != self.options.page_tokens:
            raise ConfigError(f"cache: wanted a run with {self.options.page_tokens} tokens a page, found {run.page_tokens}")
        self.tree.clock += 1
        known = self._residency.look_up(run, priority, count=not again, selective=self._selective)
        self._journal.mix(4, known.node.seq, self.tree.clock)
        if not again:
            device, host = self.counters.device, self.counters.host
            device.hits += known.device
            device.misses += run.pages - known.device
            host.hits += known.host
            host.misses += run.pages - known.known
        return known

    def peek(self, run: TokenRun) -> int:
        """Pages of `run` that the tree knows on any tier, also those on their way. Changes nothing."""
        return self.tree.peek(run)

    def lock(self, node: Node) -> None:
        """Keep `node` and all before it where it is, for a request. Local; the same on all ranks."""
        if node.parent is None and node is not self.tree.root:
            raise CommplaneError("cache: the node was evicted before it was locked: match and lock within one step")
        self.tree.lock(node)

    def unlock(self, node: Node) -> None:
        """Take back what `lock` did."""
        self._residency.unlock(node)

    def allocate(self, pages: int) -> np.ndarray | None:
        """Device pages for a request to compute into; what is needed is evicted. Local; the same on all ranks.

        None if there is no room now. Some pages may be on their way to the host then: try again after a step. A request that
        has locked what it matched, and needs more than `device_pages` with that, would try for ever.

        Raises:
            ConfigError: more than `device_pages`: there will never be room.
        """
        if not self._residency.make_device_room(pages, asks_again=True):
            most = self.device_pages
            if pages > most and self.counters.rounds:
                raise ConfigError(
                    f"cache: wanted {pages} device pages, found {most} on the rank with the fewest: refuse the request, or give "
                    f"the cache more"
                )
            return None
        self._journal.mix(5, pages)
        return self._device.take(pages, HELD)

    def release(self, pages: np.ndarray) -> None:
        """Device pages of `allocate` that did not go into the tree. Local; the same on all ranks."""
        self._journal.mix(6, len(pages))
        self._device.give_back(np.asarray(pages, dtype=np.int64), HELD)

    def insert(self, run: TokenRun, pages: np.ndarray, *, start: int = 0, priority: int = 0) -> Inserted:
        """Give the tree what was computed: it owns `pages` now. Local; the same on all ranks.

        Args:
            run: the tokens. A last page that is not full stays with the request.
            pages: from `allocate`, for the run's pages from `start` on, in order.
            start: pages of the run that came from the tree and are still locked.
            priority: of the request.
        """
        pages = np.asarray(pages, dtype=np.int64)
        if run.page_tokens != self.options.page_tokens or start + len(pages) > run.pages:
            raise ConfigError(
                f"cache: insert wants pages of {self.options.page_tokens} tokens and at most as many as the run has after page "
                f"{start}; found {len(pages)} for a run of {run.pages} pages of {run.page_tokens} tokens"
            )
        tree, residency = self.tree, self._residency
        tree.clock += 1
        path, final = residency.adopt_device(run, start, pages, priority)
        for node in path:
            node.clock = tree.clock
            if priority > node.priority:
                node.priority = priority
            if node.host is None and (self._through or (self._selective and node.hits >= self._selective)):
                residency.back_up(node)
            residency.consider(node)
        node = path[-1] if path else tree.root
        self._journal.mix(7, node.seq, tree.clock)
        return Inserted(node, final)

    def load_back(self, match: Match) -> Work | None:
        """Start to copy what the host has of `match` to the device, or as much of it as finds room. Local; the same on all ranks.

        Returns:
            The work: ``pages``, and ``agreed``: None until all ranks have ended it, then whether it went well on all; `match`
            again then. What is on its way already is returned as it is. None if there is nothing to load, or no room.
        """
        for node in match.path:
            if node.loading is not None:
                return node.loading
        return self._residency.load(n for n in match.path if not n.device_ready)

    def flush(self) -> int:
        """Start to back up everything that is on the device alone, parents first: how many pages.

        Local; the same on all ranks. It is done when, some steps later, `busy` is False.
        """
        pages = 0
        for node in sorted(self.tree.nodes(), key=lambda n: n.seq):
            if self._residency.back_up(node):
                pages += node.count
            self._residency.put(node)
        return pages

    @property
    def device_pages(self) -> int:
        """Device pages of the rank with the fewest, which is what all can use; 0 before the first agreed step."""
        return self._device.capacity - self._device.surplus

    @property
    def busy(self) -> bool:
        """Whether anything is on its way; the same on all ranks."""
        residency = self._residency
        return bool(len(residency.writes) or len(residency.loads) or len(residency.puts) or len(self._prefetches))

    # Prefetches.

    def prefetch(self, request: object, run: TokenRun, match: Match) -> bool:
        """Look into storage for what comes after `match`, and read it to the host. Local; the same on all ranks.

        Args:
            request: its name; hashable.
            run: its tokens.
            match: what the cache has of it, of this step.

        Returns:
            Whether a prefetch was begun: not without storage, for too few pages, or a second time.
        """
        node = match.node
        if node.parent is None and node is not self.tree.root:
            raise CommplaneError("cache: the match is of another step: match again before prefetch")
        return self._prefetches.start(request, run, match.known, None if node is self.tree.root else node)

    def can_terminate_prefetch(self, request: object) -> bool:
        """Whether the prefetch of `request` may end now, as all ranks see it: all can, or one stopped. Local, no collective."""
        prefetch = self._prefetches.requests.get(request)
        return prefetch is None or prefetch.state.final or prefetch.state is State.STOPPING

    def check_prefetch_progress(self, request: object) -> bool:
        """Whether `request` need not wait for its prefetch any more; to be asked when its turn comes. Local, no collective.

        The first time it says that this rank wants the request, which is a vote: from then on its timeout runs, and once all
        ranks have asked ``best_effort`` takes what is there. A rank may ask when its peers do not, and the answer is the same
        on all that ask between two steps. True once what all ranks have of it is in the tree, and without a prefetch.
        """
        prefetch = self._prefetches.requests.get(request)
        if prefetch is None:
            return True
        self._prefetches.want(prefetch)
        if not prefetch.state.final:
            return False
        del self._prefetches.requests[request]
        return True

    def release_aborted_request(self, request: object) -> None:
        """`request` was aborted: its prefetch is dropped on all ranks at an agreed step. Local, no collective.

        Each rank calls it, at whatever step it hears of the abort; the first one is enough to stop the prefetch on all. Host
        pages are freed when no rank's storage writes to them any more. Locks and device pages of the request are the
        caller's to take back. Whether the request is let in is not this call's business: that all ranks decide alike. Its name
        may be used again when every rank has called.
        """
        prefetch = self._prefetches.requests.get(request)
        if prefetch is None:
            return
        if prefetch.state.final:
            del self._prefetches.requests[request]
        prefetch.stop = DROP

    def prefetch_state(self, request: object) -> State | None:
        """State of the prefetch of `request`; None if there is none, or its end was told."""
        prefetch = self._prefetches.requests.get(request)
        return None if prefetch is None else prefetch.state

    # To look at.

    @property
    def digest(self) -> int:
        """Of everything this rank has decided; equal on all ranks at equal steps."""
        return self._journal.digest

    def decisions(self) -> list[Decision]:
        """The last decisions, oldest first."""
        return self._journal.decisions()

    def on_decision(self, listener: Callable[[Decision], None] | None) -> None:
        """Call `listener` with every decision from now on; None for nobody."""
        self._journal.listener = listener

    @property
    def storage_error(self) -> str | None:
        """The last thing that went wrong with this rank's storage; other ranks see its effect, not its text."""
        return None if self._link is None else self._link.last_error

    def owned(self) -> dict[str, dict[str, int]]:
        """Pages by owner for each tier in memory."""
        pools = [pool for pool in (self._device, self._host) if pool is not None]
        return {pool.name: dict(zip(OWNERS, pool.owned, strict=True)) for pool in pools}

    def check(self) -> None:
        """Prove that every page has one owner and every node is in order. Local; takes time with the size of the cache.

        Raises:
            CommplaneError: the first thing that is wrong.
        """
        audit(self.tree, self._residency, self._prefetches)

    def close(self, timeout: float = 30.0) -> None:
        """Wait until this rank's storage and copies have ended what uses its memory. Local. Rounds and store stay open.

        Raises:
            CommplaneError: they have not by then; the memory must not be freed.
        """
        deadline = time.monotonic() + timeout
        if self._link is not None and not self._link.wait(timeout):
            raise CommplaneError(
                f"cache: {len(self._link)} batches of storage have not ended within {timeout:g} s; "
                f"close the store before the host memory is freed"
            )
        copies = [*self._residency.writes, *self._residency.loads]
        while copies := [work for work in copies if not work.ended()]:
            if time.monotonic() >= deadline:
                raise CommplaneError(
                    f"cache: {len(copies)} copies between device and host have not ended within {timeout:g} s; wait for the "
                    f"device before the memory of either is freed"
                )
            time.sleep(0.001)
