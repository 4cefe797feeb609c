"""Which of several measured candidates is the fastest at each size: where curves cross, and which lie lowest between. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import ceil, log2

from commplane.select.timings import Curve

__all__ = ["Runner", "fastest"]

Span = tuple[int, int | None]


@dataclass(frozen=True)
class Runner:
    """A candidate with at least one point, and the sizes that it covers."""

    curve: Curve
    covers: tuple[Span, ...]

    def __contains__(self, nbytes: int) -> bool:
        return any(low <= nbytes and (high is None or nbytes < high) for low, high in self.covers)

    @property
    def first(self) -> int:
        """Smallest measured size."""
        return self.curve.points[0][0]

    @property
    def last(self) -> int:
        """Largest measured size."""
        return self.curve.points[-1][0]


def fastest(runners: Sequence[Runner]) -> list[tuple[Span, Runner]]:
    """The ranges of sizes that some runner covers, ascending, each with the best one; of equal ones the first given.

    At a size between points of some candidates, the one of these with the least time: one that was only measured at smaller or
    only at larger sizes says nothing there. Where no candidate was measured on both sides, the nearest points decide.
    """
    edges = sorted({0, *_edges(runners)})
    cuts = sorted({*edges, *(cut for low, high in pairwise(edges) for cut in _crossings(runners, low, high))})
    out: list[tuple[Span, Runner]] = []
    for low, high in pairwise([*cuts, None]):
        assert low is not None
        best = _best(runners, low)
        if best is None:
            continue
        if out and out[-1][1] is best and out[-1][0][1] == low:
            out[-1] = ((out[-1][0][0], high), best)
        else:
            out.append(((low, high), best))
    return out


def _edges(runners: Iterable[Runner]) -> Iterable[int]:
    """Between two of these, the same runners cover each size, and each curve is one line."""
    for runner in runners:
        for low, high in runner.covers:
            yield low
            if high is not None:
                yield high
        for nbytes, _ in runner.curve.points:
            yield from (nbytes, nbytes + 1)
    # Where the distances to two nearest points are equal.
    for a, b in combinations(runners, 2):
        for one, other in ((a, b), (b, a)):
            if one.last < other.first:
                yield ceil((max(one.last, 1) * other.first) ** 0.5)


def _crossings(runners: Sequence[Runner], low: int, high: int) -> Iterable[int]:
    """The sizes in ``(low, high)`` from which on one runner is faster than another."""
    there = [r for r in runners if low in r and r.first <= low < r.last]
    left, right = log2(max(low, 1)), log2(high)
    for a, b in combinations(there, 2):
        before, after = (a.curve.at(n) - b.curve.at(n) for n in (low, high))
        if before * after < 0:
            size = ceil(2 ** (left + (right - left) * before / (before - after)))
            if low < size < high:
                yield size


def _best(runners: Sequence[Runner], nbytes: int) -> Runner | None:
    def rank(runner: Runner) -> tuple[float, float]:
        return _distance(runner, nbytes), runner.curve.at(nbytes)

    return min((r for r in runners if nbytes in r), key=rank, default=None)


def _distance(runner: Runner, nbytes: int) -> float:
    """How far a size is from what was measured, as a logarithm; 0 between points."""
    if runner.first <= nbytes <= runner.last:
        return 0.0
    if nbytes > runner.last:
        return log2(nbytes / max(runner.last, 1))
    return log2(runner.first / max(nbytes, 1))
