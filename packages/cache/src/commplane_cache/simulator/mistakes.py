"""Caches that decide something alone, as the bugs did that this package is there to end. The simulator must find each of them."""

from __future__ import annotations

from collections.abc import Callable

from commplane_cache.prefetch import Prefetch, State
from commplane_cache.simulator.rank import Rank
from commplane_cache.tiers import MOVING

__all__ = ["MISTAKES"]


def own_victims(rank: Rank) -> None:
    """Victims are ordered by something that is this rank's, such as its clock or addresses; here by its number."""
    queue = rank.cache._residency.device_victims
    queue._order = lambda node: (node.clock // 8, node.seq * (rank.number + 3) % 5)


def own_free_pages(rank: Rank) -> None:
    """Room is what this rank has free, not what all have."""
    for pool in (rank.cache._device, rank.cache._host):
        assert pool is not None
        pool.__class__ = type("Alone", (type(pool),), {"available": property(lambda self: self.free)})


def own_queue_counts(rank: Rank) -> None:
    """Queues are drained by what has ended here."""
    residency = rank.cache._residency
    drain = residency.drain_puts
    residency.drain_puts = lambda ended, good: drain(*residency.puts.vote())  # type: ignore[method-assign]


def own_progress(rank: Rank) -> None:
    """What this rank has read goes into the tree."""
    slots = rank.cache._prefetches
    move = slots._move

    def alone(prefetch: object, pages: int, level: int, stop: int) -> None:
        own = prefetch.vote()[0] if prefetch.state in (State.LOADING, State.STOPPING) else pages  # type: ignore[attr-defined]
        move(prefetch, own, level, stop)  # type: ignore[arg-type]

    slots._move = alone  # type: ignore[method-assign]


def own_hit(rank: Rank) -> None:
    """Pages are asked for as far as this rank's storage has them."""
    slots = rank.cache._prefetches
    allocate = slots._allocate
    slots._allocate = lambda prefetch, hit: allocate(prefetch, prefetch.found)  # type: ignore[method-assign]


def abort_frees_at_once(rank: Rank) -> None:
    """An aborted prefetch gives its pages back while storage may still write to them."""
    slots = rank.cache._prefetches
    abort = slots._abort

    def early(prefetch: object) -> None:
        abort(prefetch)  # type: ignore[arg-type]
        if prefetch.pages is not None:  # type: ignore[attr-defined]
            slots._residency.host.give_back(prefetch.pages, MOVING)  # type: ignore[union-attr,attr-defined]
            prefetch.pages = None  # type: ignore[attr-defined]

    slots._abort = early  # type: ignore[method-assign]


def own_requests(rank: Rank) -> None:
    """A prefetch that was asked for here ends here."""
    slots = rank.cache._prefetches
    want = slots.want

    def at_once(prefetch: Prefetch) -> None:
        want(prefetch)
        if prefetch.state is State.QUERYING:
            slots._end(prefetch, State.REVOKED)

    slots.want = at_once  # type: ignore[method-assign]


def failures_are_not_told(rank: Rank) -> None:
    """A write to the host that failed here counts as good."""
    residency = rank.cache._residency
    vote = residency.writes.vote

    class Hopeful(type(residency.writes)):  # type: ignore[misc]
        __slots__ = ()

        def vote(self) -> tuple[int, int]:
            ended, _ = vote()
            return ended, ended

    residency.writes.__class__ = Hopeful


MISTAKES: dict[str, Callable[[Rank], None]] = {
    mistake.__name__: mistake
    for mistake in (
        own_victims,
        own_free_pages,
        own_queue_counts,
        own_progress,
        own_hit,
        abort_frees_at_once,
        own_requests,
        failures_are_not_told,
    )
}
"""Name -> what is done to a rank's cache before it starts."""
