"""What the registry counts, in Prometheus' words. Each server has a registry of its own, so several fit in one process."""

from __future__ import annotations

import contextlib

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Metrics:
    """The numbers; `render` gives the page."""

    def __init__(self) -> None:
        self._all = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"commplane_disagg_{name}", text, labels, registry=self._all)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"commplane_disagg_{name}", text, labels, registry=self._all)

        self._requests = counter("requests", "Answered requests.", "route", "status")
        self._refused = counter("unauthenticated", "Requests refused for their Authorization header.", "reason")
        self._changes = counter("changes", "Rows that came, went or changed hands.", "group", "kind")
        self._rows = gauge("rows", "Rows now.", "group")
        self._wanted = gauge("grid", "Rows that the declared grid wants.", "group")
        self._ready = gauge("ready", "Whether every place of the grid has its row.", "group")
        self._rooms = gauge("rooms", "Rooms whose dp rank is known.", "group")
        self.waiting = gauge("waiting", "Requests that wait for a change.")
        self._seconds = Histogram(
            "commplane_disagg_request_seconds", "Time to answer, long polls left out.", registry=self._all, buckets=_SECONDS
        )

    def answered(self, route: str, status: int, seconds: float | None) -> None:
        """One request; `seconds` is None for one that was asked to wait."""
        self._requests.labels(route, str(status)).inc()
        if seconds is not None:
            self._seconds.observe(seconds)

    def refused(self, reason: str) -> None:
        """One request that was not authentic."""
        self._refused.labels(reason).inc()

    def changed(self, group: str, kind: str) -> None:
        """One entry of the feed."""
        self._changes.labels(group, kind).inc()

    def observe(self, group: str, rows: int, wanted: int, ready: bool, rooms: int) -> None:
        """What a group holds; asked for when the page is."""
        for gauge, value in ((self._rows, rows), (self._wanted, wanted), (self._ready, int(ready)), (self._rooms, rooms)):
            gauge.labels(group).set(value)

    def forget(self, group: str) -> None:
        """A group is not kept any more; its series end."""
        for gauge in (self._rows, self._wanted, self._ready, self._rooms):
            with contextlib.suppress(KeyError):  # it was never shown; some versions say so
                gauge.remove(group)
        for kind in ("registered", "replaced", "withdrawn", "expired"):
            with contextlib.suppress(KeyError):
                self._changes.remove(group, kind)

    def render(self) -> bytes:
        """The page, in the text format of Prometheus."""
        return generate_latest(self._all)
