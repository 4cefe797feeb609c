"""The chart of the demo: hit rate and latency over the stream."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from commplane_cache.demo.report import Pass

__all__ = ["can_draw", "draw"]

_TIERS = (("device", "#3b7dd8"), ("host", "#58b368"), ("storage", "#e0a030"))
_LINES = ("#8a8a8a", "#3b7dd8", "#e0a030", "#b04fb0")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(passes: Sequence[Pass], title: str, path: Path) -> None:
    """Write a PNG: for each pass with the cache a row with the tier that each request's prompt came from; latency below.

    Wants matplotlib; look at `can_draw` first.
    """
    from matplotlib.figure import Figure  # no pyplot: no window system is asked for

    cached = [p for p in passes if p.cached]
    figure = Figure(figsize=(9, 2.4 * (len(cached) + 1) + 0.6), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(cached) + 1, 1, squeeze=False)[:, 0]
    for row, one in zip(rows, cached, strict=False):
        base = [0.0] * len(one.requests)
        places = list(range(1, len(one.requests) + 1))
        for tier, colour in _TIERS:
            part = [100 * r.tokens_of(tier) / r.prompt for r in one.requests]
            row.bar(places, part, bottom=base, color=colour, label=tier, width=0.9)
            base = [b + p for b, p in zip(base, part, strict=True)]
        row.set(ylabel="% of the prompt", ylim=(0, 100), title=f"{one.name}: where prompts came from (the rest was computed)")
        row.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")  # beside: the bars fill the picture
    last = rows[-1]
    for one, colour in zip(passes, _LINES, strict=False):
        last.plot(
            range(1, len(one.requests) + 1), [1e3 * r.first for r in one.requests], ".-", lw=1, color=colour, label=one.name
        )
    last.set(ylabel="ms to the first token", xlabel="request", ylim=(0, None), title="latency of a request, from its admission")
    last.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    figure.savefig(path, dpi=120)
