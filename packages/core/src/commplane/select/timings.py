"""What candidates took where they were measured: a table that a plan can follow instead of the order of preference.

A **candidate** is one way to run a collective: a backend that has it whole (``"custom_ar"``), or for a norm after an all-reduce
what it is composed of: ``"composed:custom_ar"`` is the all-reduce of that backend and torch, ``"composed_norm:custom_ar"`` the
norm of it and torch's quantisation.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf, isfinite, log2
from typing import Any

from commplane.api import Collective, Variant

__all__ = ["Curve", "Key", "Timings"]

Key = tuple[str, str | None, str, bool]
"""Collective, variant, dtype, and whether in a graph."""


@dataclass(frozen=True)
class Curve:
    """One candidate of one call.

    Attributes:
        collective: its name.
        variant: the op or format, or None where there is none.
        dtype: torch's name.
        graph: whether it was measured in replayed CUDA graphs.
        candidate: its label, as above.
        points: bytes of a rank's tensor and microseconds of the slowest rank, sizes ascending.
        failed: why it must not run, such as a wrong result; empty for one that may.
        failed_from: bytes from which on it must not; 0 after a wrong result.
        hidden: last dimension of the tensors it was measured with; 0 where that means nothing. Others may take other times.
        source: for people, where the times are from; empty for what the group itself has measured.
    """

    collective: str
    variant: str | None
    dtype: str
    graph: bool
    candidate: str
    points: tuple[tuple[int, float], ...] = ()
    failed: str = ""
    failed_from: int = 0
    hidden: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        sizes = [n for n, _ in self.points]
        if sizes != sorted(set(sizes)) or any(n < 0 for n in sizes):
            raise ValueError(f"points of {self.candidate} want ascending sizes of 0 or more, found {sizes}")
        if self.failed and any(n >= self.failed_from for n in sizes):
            raise ValueError(f"{self.candidate} failed from {self.failed_from} bytes on and wants no point there, found {sizes}")
        if not all(isfinite(us) and us > 0 for _, us in self.points):
            raise ValueError(f"points of {self.candidate} want times above 0, found {[us for _, us in self.points]}")

    @property
    def key(self) -> Key:
        """What it is a candidate of."""
        return self.collective, self.variant, self.dtype, self.graph

    @property
    def measured(self) -> str:
        """For people: the hidden size of the tensors, and where the times are from; empty where nothing is to be said."""
        hidden = f"hidden {self.hidden}" if self.hidden else ""
        return ", ".join(text for text in (hidden, self.source) if text)

    def at(self, nbytes: int) -> float:
        """Microseconds at a size: on a line over the logarithm of the bytes, outside of the points those of the nearest one."""
        i = bisect_left(self.points, (nbytes, -inf))
        if i == len(self.points):
            return self.points[-1][1]
        (high, above) = self.points[i]
        if i == 0 or high == nbytes:
            return above
        low, below = self.points[i - 1]
        return below + (above - below) * (log2(max(nbytes, 1)) - log2(max(low, 1))) / (log2(high) - log2(max(low, 1)))

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the names of the attributes."""
        points = [[n, us] for n, us in self.points]
        out: dict[str, Any] = {"collective": self.collective, "variant": self.variant, "dtype": self.dtype, "graph": self.graph}
        out |= {"candidate": self.candidate, "hidden": self.hidden, "points": points}
        return out | {"failed": self.failed, "failed_from": self.failed_from, "source": self.source}

    @classmethod
    def from_json(cls, value: Any) -> Curve:
        """From `to_json`.

        Raises:
            ValueError: it is no such object.
        """
        wanted = {"collective": str, "dtype": str, "graph": bool, "candidate": str, "points": list, "failed": str, "source": str}
        for name, kind in wanted.items():
            if not isinstance(value, Mapping) or not isinstance(value.get(name), kind):
                raise ValueError(f"a curve wants {name!r} as {kind.__name__}, found {value!r:.200}")
        collective, variant = value["collective"], value.get("variant")
        if collective not in Collective._value2member_map_:
            raise ValueError(f"a curve wants one of {', '.join(Collective)}, found {collective!r}")
        if variant not in {v and str(v) for v in Collective(collective).variants}:
            raise ValueError(f"a curve of {collective} wants one of its variants, found {variant!r}")
        for name in ("failed_from", "hidden"):
            if not _whole(value.get(name)) or value[name] < 0:
                raise ValueError(f"a curve wants {name!r} as a whole number of 0 or more, found {value.get(name)!r}")
        points = value["points"]
        if not all(isinstance(p, Sequence) and len(p) == 2 and _whole(p[0]) and _number(p[1]) for p in points):
            raise ValueError(f"a curve wants points of whole bytes and microseconds, found {points!r:.200}")
        if not points and not value["failed"]:
            raise ValueError(f"the curve of {value['candidate']} wants a point, or why it failed, found neither")
        measured = tuple((n, float(us)) for n, us in points)
        named = {name: value[name] for name in ("dtype", "graph", "candidate", "failed", "failed_from", "hidden", "source")}
        return cls(collective, variant, points=measured, **named)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Timings:
    """Curves of many candidates; at most one of each candidate for each key. The order in which they were given is forgotten."""

    curves: tuple[Curve, ...] = ()

    def __post_init__(self) -> None:
        ordered = sorted(self.curves, key=lambda c: (c.collective, c.variant or "", c.dtype, c.graph, c.candidate))
        twice = [b for a, b in pairwise(ordered) if (a.key, a.candidate) == (b.key, b.candidate)]
        if twice:
            raise ValueError(f"timings want each candidate once, found {twice[0].candidate} of {twice[0].key} twice")
        object.__setattr__(self, "curves", tuple(ordered))

    @cached_property
    def _by_key(self) -> dict[Key, dict[str, Curve]]:
        out: dict[Key, dict[str, Curve]] = {}
        for curve in self.curves:
            out.setdefault(curve.key, {})[curve.candidate] = curve
        return out

    def of(self, collective: Collective, variant: Variant | None, dtype: str, *, graph: bool) -> Mapping[str, Curve]:
        """The candidates of a call by label.

        What was measured in graphs holds outside of them where nothing was measured there, and the other way round.
        """
        key = (str(collective), variant and str(variant), dtype)
        return self._by_key.get((*key, graph)) or self._by_key.get((*key, not graph), {})

    def said_by(self, source: str) -> Timings:
        """The same, from there."""
        return Timings(tuple(replace(c, source=source) for c in self.curves))

    def dtypes(self, collective: Collective) -> set[str]:
        """Those that something was measured in."""
        return {c.dtype for c in self.curves if c.collective == collective}

    def merged(self, newer: Iterable[Curve]) -> Timings:
        """These with what `newer` has of a key in place of what was there of that key."""
        new = tuple(newer)
        keys = {c.key for c in new}
        return Timings((*(c for c in self.curves if c.key not in keys), *new))

    def to_json(self) -> list[Any]:
        """JSON that is equal for equal timings."""
        return [c.to_json() for c in self.curves]

    @classmethod
    def from_json(cls, value: Any) -> Timings:
        """From `to_json`.

        Raises:
            ValueError: it is no such list.
        """
        if not isinstance(value, list):
            raise ValueError(f"timings want a list of curves, found {value!r:.200}")
        return cls(tuple(Curve.from_json(v) for v in value))

    @property
    def digest(self) -> str:
        """Hash of everything above."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]
