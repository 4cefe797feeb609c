"""An end's `stats` for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from commplane_disagg.ends.end import End

__all__ = ["EndCollector"]

_WORDS = {
    "rooms": "Rooms that are open.",
    "pages_lent": "Pages that belong to open rooms.",
    "rooms_quarantined": "Failed rooms into whose pages a write may still land.",
    "pages_quarantined": "Pages of those rooms: lost to the engine until somebody proves that no write can land.",
    "peers_away": "Peers that rooms wait for and that are not connected.",
    "late_messages": "Messages for rooms that are over.",
    "success": "Rooms that succeeded.",
    "failed": "Rooms that failed.",
    "released": "Rooms whose pages came back.",
    "quarantined": "Rooms that went into quarantine.",
    "lifted": "Rooms that came out of quarantine.",
}


class EndCollector(Collector):
    """To be registered with a `prometheus_client` registry: ``REGISTRY.register(EndCollector(end))``.

    Reads numbers that the scheduler's thread writes, and never waits for it.
    """

    def __init__(self, end: End) -> None:
        self._end = end

    def collect(self) -> Iterator[Metric]:
        """One family for each number of `End.stats`, with the end's name as label."""
        for name, value in self._end.stats().items():
            base = name.removesuffix("_total")
            kind = CounterMetricFamily if base != name or name == "late_messages" else GaugeMetricFamily
            family = kind(f"commplane_disagg_{'rooms_' if base != name else ''}{base}", _WORDS[base], labels=["end"])
            family.add_metric([self._end.name], value)
            yield family
