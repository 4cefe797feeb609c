"""Which candidate runs which sizes: the sizes of each (collective, op, dtype) cut into ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from commplane.api import BackendSpec, Collective, Numerics, QuantFormat, ReduceOp, SizeRange, Variant
from commplane.select.fastest import Runner, fastest
from commplane.select.offers import ANY_DTYPE, Offer
from commplane.select.timings import Curve, Timings

__all__ = [
    "Route",
    "candidates",
    "compile_routes",
    "has_mean",
    "has_norm",
    "in_class",
    "joined",
    "parts_of",
    "ruled_out",
    "serves",
    "take",
]

_COMPOSED = {Collective.ALL_REDUCE: "composed", Collective.ALL_REDUCE_RMS_NORM: "composed_norm"}


@dataclass(frozen=True)
class Route:
    """``low <= bytes < high`` of one (collective, op, dtype) go to one backend. `high` None means without limit.

    Of `all_reduce_rms_norm_quant` the op is the format.

    Attributes:
        algorithm: what the backend says it runs there, if it does.
        part: what the backend does of it, an all-reduce or the norm not quantised, and torch the rest; None for all of it.
    """

    collective: Collective
    op: Variant | None
    dtype: str
    low: int
    high: int | None
    backend: str
    algorithm: str = ""
    part: Collective | None = None

    @property
    def label(self) -> str:
        """The backend, and its algorithm where that has a name."""
        return f"{self.backend} {self.algorithm}".rstrip()

    @property
    def candidate(self) -> str:
        """How `Timings` call this way to run it."""
        return self.backend if self.part is None else f"{_COMPOSED[self.part]}:{self.backend}"

    @property
    def how(self) -> str:
        """The same for people: ``custom_ar``, or ``composed of all_reduce by custom_ar and torch``."""
        return self.backend if self.part is None else f"composed of {self.part} by {self.backend} and torch"

    def serves(self, nbytes: int) -> bool:
        """Whether a message of this size goes here."""
        return self.low <= nbytes and (self.high is None or nbytes < self.high)

    def of_part(self) -> Route:
        """Of a composed one, the route of its part."""
        if self.part is None:
            return self
        op = ReduceOp.SUM if self.part is Collective.ALL_REDUCE else None
        return replace(self, collective=self.part, op=op, part=None)

    def to_json(self) -> list[Any]:
        """As a list; the algorithm stands at the end where there is one, and behind it the part."""
        out = [str(self.collective), self.op and str(self.op), self.dtype, self.low, self.high, self.backend]
        if self.part is not None:
            return [*out, self.algorithm, str(self.part)]
        return [*out, self.algorithm] if self.algorithm else out


def has_mean(dtype: str) -> bool:
    """A mean of integers is no integer; torch refuses it too."""
    return not dtype.startswith(("int", "uint", "bool"))


def has_norm(dtype: str) -> bool:
    """A norm of integers is none; that of complex numbers is not what this one is."""
    return dtype == ANY_DTYPE or dtype.startswith(("float", "bfloat"))


def serves(spec: BackendSpec, op: Variant | None) -> bool:
    """Whether the spec has this op or format."""
    return op is None or op in (spec.formats if isinstance(op, QuantFormat) else spec.ops)


def in_class(spec: BackendSpec, numerics: str) -> bool:
    """Whether what a backend promises of the order of additions is enough for the setting `numerics`."""
    return numerics == "any" or spec.numerics is Numerics.RANK_ORDER


def parts_of(collective: Collective) -> list[tuple[Collective, Variant | None]]:
    """What `collective` can be composed of, with torch for the rest. A norm that is a part may be composed in its turn."""
    if collective is Collective.ALL_REDUCE_RMS_NORM:
        return [(Collective.ALL_REDUCE, ReduceOp.SUM)]
    return [(Collective.ALL_REDUCE_RMS_NORM, None)] if collective is Collective.ALL_REDUCE_RMS_NORM_QUANT else []


def compile_routes(
    specs: Sequence[BackendSpec],
    numerics: str = "any",
    offers: Sequence[Offer] = (),
    *,
    capturing: bool = False,
    timings: Timings | None = None,
) -> tuple[Route, ...]:
    """Cut the sizes of each (collective, op, dtype) into ranges. Pure.

    Ranges, not one threshold a backend: the best candidate is not monotone in size. A backend covers what its spec says, and of
    that only what it offers where it has an offer. In the order of preference come backends that have the collective whole,
    and after these what its part's routes name. The first that covers a size has it; where that one was measured, the fastest
    of all that were.
    """
    timings = timings or Timings()
    out: dict[tuple[Collective, Variant | None, str], list[Route]] = {}
    named: dict[Collective, set[str]] = {}
    for collective in Collective:  # a part comes before what is composed of it
        named[collective] = {d for s in specs if collective in s.collectives() for d in s.dtypes} | timings.dtypes(collective)
        for part, _ in parts_of(collective):
            named[collective] |= named[part]
        dtypes = [ANY_DTYPE] if collective is Collective.BARRIER else [*sorted(named[collective]), ANY_DTYPE]
        for op in collective.variants:
            for dtype in dtypes:
                curves = timings.of(collective, op, dtype, graph=capturing)
                ways = candidates(specs, collective, op, dtype, numerics, offers, capturing=capturing)
                possible = {r.candidate for r in ways}
                as_parts_go = [
                    way
                    for part, variant in parts_of(collective)
                    for r in out.get((part, variant, dtype)) or out.get((part, variant, ANY_DTYPE), [])
                    if (way := _composed(r, collective, op, dtype)).candidate in possible
                ]
                whole = [r for r in ways if r.part is None]
                made = [r for r in ways if r.part is not None]  # left where the routes of the parts give what failed here
                order = _right([*whole, *as_parts_go, *made], timings, capturing)
                out[collective, op, dtype] = joined(sorted(_first_come(_by_time(order, curves)), key=lambda r: r.low))
    routes = (r for of_one in out.values() for r in of_one)
    return tuple(sorted(routes, key=lambda r: (str(r.collective), str(r.op), r.dtype, r.low)))


def ruled_out(way: Route, timings: Timings, *, capturing: bool = False) -> Curve | None:
    """The curve that says from which size on a way must not run: its own, or that of what it is made of. Pure."""
    found = [timings.of(way.collective, way.op, way.dtype, graph=capturing).get(way.candidate)]
    if way.part is not None:
        within = parts_of(way.collective)[0]
        inner = replace(way, collective=within[0], op=within[1], part=None if way.part is within[0] else way.part)
        found.append(ruled_out(inner, timings, capturing=capturing))
    failed = [curve for curve in found if curve is not None and curve.failed]
    return min(failed, key=lambda curve: curve.failed_from, default=None)


def _right(ways: Iterable[Route], timings: Timings, capturing: bool) -> list[Route]:
    """Of these, the sizes at which nothing has failed."""
    out: list[Route] = []
    for r in ways:
        failed = ruled_out(r, timings, capturing=capturing)
        spans = [(r.low, r.high)] if failed is None else take([(r.low, r.high)], 0, failed.failed_from)[0]
        out.extend(replace(r, low=low, high=high) for low, high in spans)
    return out


def candidates(
    specs: Sequence[BackendSpec],
    collective: Collective,
    op: Variant | None,
    dtype: str,
    numerics: str = "any",
    offers: Sequence[Offer] = (),
    *,
    capturing: bool = False,
) -> list[Route]:
    """Every way to run a call, in the order of preference, with all sizes that it covers: different ways overlap. Pure."""
    if collective.norms and not has_norm(dtype):
        return []
    ways = [
        Route(collective, op, dtype, r.low, r.high, spec.name, r.algorithm)
        for spec in specs
        for r in _covered(spec, collective, op, dtype, numerics, offers, capturing)
    ]
    for part, variant in parts_of(collective):
        of_part = candidates(specs, part, variant, dtype, numerics, offers, capturing=capturing)
        ways.extend(_composed(r, collective, op, dtype) for r in of_part)
    return ways


def _composed(r: Route, collective: Collective, op: Variant | None, dtype: str) -> Route:
    """`collective` made of what `r` does."""
    return replace(r, collective=collective, op=op, dtype=dtype, algorithm="", part=r.part or r.collective)


def _covered(
    spec: BackendSpec,
    collective: Collective,
    op: Variant | None,
    dtype: str,
    numerics: str,
    offers: Sequence[Offer],
    capturing: bool,
) -> list[SizeRange]:
    """The sizes at which a backend has a collective whole."""
    if collective not in spec.collectives() or not serves(spec, op):
        return []
    if collective is Collective.BARRIER:  # has no size, and no dtype
        return [SizeRange(0, None)]
    if (collective.combines and not in_class(spec, numerics)) or (spec.dtypes and dtype not in spec.dtypes):
        return []
    if op is ReduceOp.AVG and not has_mean(dtype):
        return []
    low, high = spec.min_bytes, None if spec.max_bytes is None else spec.max_bytes + 1
    asked = spec.name, collective, dtype if spec.dtypes else ANY_DTYPE, capturing
    offered = next((o.ranges for o in offers if (o.backend, o.collective, o.dtype, o.capturing) == asked), None)
    return [SizeRange(low, high)] if offered is None else _within(offered, low, high)


def _by_time(order: Sequence[Route], curves: Mapping[str, Curve]) -> list[Route]:
    """The same order with the fastest of all measured ways in place of each measured one, at the sizes that this one covers."""
    measured = {label: curve for label, curve in curves.items() if curve.points}
    runners = [
        Runner(measured[label], tuple((r.low, r.high) for r in order if r.candidate == label))
        for label in dict.fromkeys(r.candidate for r in order)
        if label in measured
    ]
    best = [
        replace(r, low=a, high=b)
        for (low, high), runner in fastest(runners)
        for r in order
        if r.candidate == runner.curve.candidate
        for a, b in take([(r.low, r.high)], low, high)[0]
    ]
    out: list[Route] = []
    for r in order:
        if r.candidate in measured:
            out.extend(replace(b, low=x, high=y) for b in best for x, y in take([(b.low, b.high)], r.low, r.high)[0])
        else:
            out.append(r)
    return out


def _first_come(order: Iterable[Route]) -> list[Route]:
    """Of routes that may overlap, the parts that no earlier one has."""
    free: list[tuple[int, int | None]] = [(0, None)]
    out: list[Route] = []
    for r in order:
        taken, free = take(free, r.low, r.high)
        out.extend(replace(r, low=low, high=high) for low, high in taken)
    return out


def _within(ranges: Sequence[SizeRange], low: int, high: int | None) -> list[SizeRange]:
    """The parts of `ranges` that lie in ``[low, high)``."""
    return [replace(r, low=a, high=b) for r in ranges for a, b in take([(r.low, r.high)], low, high)[0]]


def joined(routes: Sequence[Route]) -> list[Route]:
    """The same with neighbours together that differ in nothing else."""
    out: list[Route] = []
    for r in routes:
        if out and out[-1].high == r.low and replace(out[-1], low=r.low, high=r.high) == r:
            out[-1] = replace(out[-1], high=r.high)
        else:
            out.append(r)
    return out


def take(
    free: Sequence[tuple[int, int | None]], low: int, high: int | None
) -> tuple[list[tuple[int, int | None]], list[tuple[int, int | None]]]:
    """Split the free ranges into those inside ``[low, high)`` and the rest."""
    infinite = float("inf")
    taken: list[tuple[int, int | None]] = []
    rest: list[tuple[int, int | None]] = []
    for start, end in free:
        stop = infinite if end is None else end
        inner_low, inner_high = max(start, low), min(stop, infinite if high is None else high)
        if inner_low >= inner_high:
            rest.append((start, end))
            continue
        taken.append((inner_low, None if inner_high == infinite else int(inner_high)))
        if start < inner_low:
            rest.append((start, inner_low))
        if inner_high < stop:
            rest.append((int(inner_high), end))
    return taken, rest
