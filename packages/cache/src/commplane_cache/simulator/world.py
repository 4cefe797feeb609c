"""All ranks, step by step: their rounds, their comparison, and what is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from commplane.api import SyncRound, SyncSpec
from commplane.errors import CommplaneError
from commplane_cache.agreed import cache_sync_spec
from commplane_cache.options import CacheOptions
from commplane_cache.simulator.rank import Faults, Rank
from commplane_cache.simulator.workload import PAGE_TOKENS, Workload

__all__ = ["Outcome", "Scenario", "simulate"]

RoundsOf = Callable[[int, Sequence[SyncSpec]], Sequence[SyncRound]]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is played.

    Attributes:
        ranks: virtual ranks.
        steps: scheduler steps.
        seed: of everything that is drawn.
        device, host: pages of each tier, of the rank with the fewest.
        arrive: requests a step.
        abort: aborts a step.
        check_every: steps between two proofs that no page is lost or owned twice, on all ranks.
        faults: what goes wrong on each rank alone.
        options: of the cache; by default drawn with the seed.
        mistake: done to every rank's cache before it starts, see `commplane_cache.simulator.mistakes`.
    """

    ranks: int = 64
    steps: int = 1000
    seed: int = 0
    device: int = 40
    host: int = 44
    arrive: float = 0.25
    abort: float = 0.03
    check_every: int = 500
    faults: Faults = field(default_factory=Faults)
    options: CacheOptions | None = None
    mistake: Callable[[Rank], None] | None = None

    def cache_options(self) -> CacheOptions:
        """Those of the scenario, or policies drawn with the seed."""
        if self.options is not None:
            return self.options
        seed = self.seed
        return CacheOptions(
            page_tokens=PAGE_TOKENS,
            evict=("lru", "lfu", "priority")[seed % 3],
            write=("write_through", "write_through_selective", "write_back")[seed // 3 % 3],
            prefetch=("timeout", "best_effort", "wait_complete")[seed // 9 % 3],
            pipelined=bool(seed // 27 % 2),
            prefetch_slots=2,
            prefetch_batch_pages=2,
            timeout_base=1.0,
            timeout_per_1024_tokens=200.0,
            timeout_most=8.0,
            decisions=64,
        )


@dataclass(frozen=True)
class Outcome:
    """What came of it; the numbers are those of one rank, since all are equal.

    Attributes:
        digest: of all decisions.
        served, computed, reused: requests, and pages of their prompts.
        counters: of the cache, see `commplane_cache.metrics`.
    """

    digest: int
    served: int
    computed: int
    reused: int
    counters: dict[str, object]


def simulate(scenario: Scenario, rounds_of: RoundsOf, told: Callable[[int], None] | None = None) -> Outcome:
    """Play `scenario` to its end, and then until nothing is on its way.

    Args:
        scenario: what.
        rounds_of: the rounds of so many ranks over these specs, such as ``commplane.testing.SimulatedRounds``.
        told: called after each step with its number, for progress.

    Raises:
        CommplaneError: the ranks' digests differ, a page is lost or owned twice, or has another request's bytes.
    """
    options = scenario.cache_options()
    rounds = rounds_of(scenario.ranks, [cache_sync_spec(options.prefetch_slots)])
    faults = scenario.faults.of_one(scenario.ranks)
    ranks = [Rank(i, scenario.seed, rounds[i], options, faults, scenario.device, scenario.host) for i in range(scenario.ranks)]
    if scenario.mistake is not None:
        for rank in ranks:
            scenario.mistake(rank)
    workload = Workload(scenario.seed, scenario.ranks, arrive=scenario.arrive, abort=scenario.abort)
    caches = [rank.cache for rank in ranks]

    def agree(first: bool) -> None:
        if options.pipelined and not first:
            for cache in caches:
                cache.result()
        for cache in caches:
            cache.issue()
        if not options.pipelined:
            for cache in caches:
                cache.result()

    for number in range(scenario.steps):
        agree(first=number == 0)
        step = workload.step()
        for rank in ranks:
            rank.play(step)
        digest = caches[0].digest
        for rank in ranks:  # also where the rounds are of smaller groups, and could not see it
            if rank.cache.digest != digest:
                raise _differ(ranks[0], rank, number)
        if number % scenario.check_every == scenario.check_every - 1:
            for rank in ranks:
                rank.check()
        if told is not None:
            told(number + 1)
    _come_to_rest(scenario, ranks, agree)
    first = ranks[0]
    return Outcome(first.cache.digest, first.served, first.computed, first.reused, first.cache.counters.to_json())


def _come_to_rest(scenario: Scenario, ranks: list[Rank], agree: Callable[[bool], None]) -> None:
    """Play on without new requests until all is done: then no page may be held, and none on its way."""
    from commplane_cache.simulator.workload import Step

    for _ in range(2000):
        agree(scenario.steps == 0)
        for rank in ranks:
            rank.play(Step())
        if not any(rank.cache.busy or rank.waits for rank in ranks):
            break
    for rank in ranks:
        rank.check()
        if rank.cache._prefetches.requests:
            raise CommplaneError(f"simulator: at the end rank {rank.number} still remembers prefetches")
        for tier, owned in rank.cache.owned().items():
            if owned["held"] or owned["moving"]:
                raise CommplaneError(f"simulator: at the end rank {rank.number} has {owned} pages on the {tier}")


def _differ(one: Rank, other: Rank, step: int) -> CommplaneError:
    theirs = {decision.number: decision for decision in other.cache.decisions()}
    ours = {decision.number: decision for decision in one.cache.decisions()}
    kept = range(max(min(ours), min(theirs)), max(*ours, *theirs) + 1) if ours and theirs else ()
    number = next((n for n in kept if ours.get(n) != theirs.get(n)), None)
    words = "no decision does: they looked up or locked something else"
    if number is not None:
        words = f"the first decision in which they do: {ours.get(number)} and {theirs.get(number)}"
    return CommplaneError(f"simulator: in step {step} the digests of rank {one.number} and rank {other.number} differ; {words}")
