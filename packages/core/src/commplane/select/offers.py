"""What backends answer when they are asked for the sizes that they should be chosen for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from commplane.api import BackendSpec, Collective, CommBackend, SizeRange

__all__ = ["ANY_DTYPE", "Offer", "ask", "of_graphs", "said"]

ANY_DTYPE = "*"
"""Stands for every dtype that is not named."""


@dataclass(frozen=True)
class Offer:
    """One answer of `CommBackend.ranges`, in the order of sizes. `dtype` is ``*`` for a spec that names none."""

    backend: str
    collective: Collective
    dtype: str
    capturing: bool
    ranges: tuple[SizeRange, ...]

    def to_json(self) -> list[Any]:
        """JSON that is equal for equal answers."""
        ranges = [[r.low, r.high, r.algorithm] for r in self.ranges]
        return [self.backend, str(self.collective), self.dtype, self.capturing, ranges]


def ask(spec: BackendSpec, backend: CommBackend) -> tuple[Offer, ...]:
    """Every answer of an open backend that is not None. Local.

    Raises:
        ValueError: two ranges of one answer overlap.
        TypeError: an answer is not made of `SizeRange`.
    """
    offers = []
    for collective in spec.collectives():
        if collective is Collective.BARRIER:  # has no size
            continue
        for dtype in sorted(spec.dtypes) or [ANY_DTYPE]:
            for capturing in (False, True):
                answer = backend.ranges(collective, dtype, capturing)
                if answer is not None:
                    offers.append(Offer(spec.name, collective, dtype, capturing, _checked(spec, collective, dtype, answer)))
    return tuple(offers)


def _checked(spec: BackendSpec, collective: Collective, dtype: str, answer: Sequence[Any]) -> tuple[SizeRange, ...]:
    who = f"{spec.name}: ranges({collective}, {dtype})"
    strange = [r for r in answer if not isinstance(r, SizeRange)]
    if strange:
        raise TypeError(f"{who} must give SizeRanges, found {strange[0]!r}")
    ordered = tuple(sorted(answer, key=lambda r: r.low))
    for one, next_ in pairwise(ordered):
        if one.high is None or one.high > next_.low:
            raise ValueError(f"{who} must give ranges that do not overlap, found {one} and {next_}")
    return ordered


def of_graphs(offers: Sequence[Offer]) -> bool:
    """Whether some backend answers for captures otherwise than for eager calls. Pure."""

    def those(capturing: bool) -> set[tuple[Any, ...]]:
        return {(o.backend, o.collective, o.dtype, o.ranges) for o in offers if o.capturing is capturing}

    return those(True) != those(False)


def said(offers: Sequence[Offer]) -> dict[str, str]:
    """The answers as text by what was asked, so that two ranks' can be compared line by line. Pure."""
    return {
        f"{o.backend} {o.collective} {o.dtype}{' in a graph' if o.capturing else ''}": ", ".join(map(str, o.ranges)) or "no size"
        for o in offers
    }
