"""What the cache counts, a tier, and as metrics for Prometheus.

Counting is an addition to an attribute; Prometheus' objects are made when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["TIERS", "CacheCollector", "Counters", "TierCounters"]

TIERS = ("device", "host", "storage")


@dataclass
class TierCounters:
    """Pages of one tier since the start.

    Attributes:
        hits: of prompts, found here; for storage: asked for and there on all ranks.
        misses: of prompts, not found here or on a tier above; for storage: asked for and missing on some rank.
        filled: put here: computed, copied or read.
        moved: read from here into the tier above.
        evicted: dropped for room.
        failed: copies, reads or writes to this tier that failed on some rank.
        skipped: not put here for want of room.
    """

    hits: int = 0
    misses: int = 0
    filled: int = 0
    moved: int = 0
    evicted: int = 0
    failed: int = 0
    skipped: int = 0


class Counters:
    """Counters of one cache: one `TierCounters` a tier, and a few of the whole. Equal on all ranks."""

    __slots__ = ("aborted", "device", "host", "prefetches", "revoked", "rounds", "storage")

    def __init__(self) -> None:
        self.device, self.host, self.storage = TierCounters(), TierCounters(), TierCounters()
        self.rounds = self.prefetches = self.revoked = self.aborted = 0

    def tiers(self) -> dict[str, TierCounters]:
        """By name of the tier."""
        return {"device": self.device, "host": self.host, "storage": self.storage}

    def to_json(self) -> dict[str, object]:
        """All of it as a JSON object."""
        whole = {name: getattr(self, name) for name in ("rounds", "prefetches", "revoked", "aborted")}
        return {**whole, **{name: asdict(tier) for name, tier in self.tiers().items()}}


_HELP = {
    "hits": "Pages of prompts found in the tier",
    "misses": "Pages of prompts found neither in the tier nor above",
    "filled": "Pages put into the tier",
    "moved": "Pages moved from the tier to the one above",
    "evicted": "Pages dropped from the tier for room",
    "failed": "Pages whose copy, read or write failed on some rank",
    "skipped": "Pages not put into the tier for want of room",
}


class CacheCollector(Collector):
    """A cache for ``prometheus_client``: ``REGISTRY.register(CacheCollector(cache.counters, cache.owned))``.

    Args:
        counters: of the cache.
        owned: gives pages by owner for each tier in memory.
        labels: of every metric, such as ``{"rank": "3"}``.
    """

    def __init__(
        self,
        counters: Counters,
        owned: Callable[[], Mapping[str, Mapping[str, int]]],
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._counters, self._owned = counters, owned
        self._labels = dict(labels or {})

    def collect(self) -> Iterable[Metric]:
        """All metrics as they are now."""
        names, values = [*self._labels, "tier"], list(self._labels.values())
        tiers = self._counters.tiers()
        for what, text in _HELP.items():
            family = CounterMetricFamily(f"commplane_cache_{what}_pages", f"{text}.", labels=names)
            for tier, counters in tiers.items():
                family.add_metric([*values, tier], getattr(counters, what))
            yield family
        for what in ("rounds", "prefetches", "revoked", "aborted"):
            whole = CounterMetricFamily(
                f"commplane_cache_{what}", f"Number of {what} since the start.", labels=list(self._labels)
            )
            whole.add_metric(values, getattr(self._counters, what))
            yield whole
        pages = GaugeMetricFamily("commplane_cache_pages", "Pages by owner.", labels=[*names, "owner"])
        for tier, owners in self._owned().items():
            for owner, count in owners.items():
                pages.add_metric([*values, tier, owner], count)
        yield pages
