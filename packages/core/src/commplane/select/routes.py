"""Which backend runs which sizes: the sizes of each (collective, op, dtype) cut into ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from commplane.api import BackendSpec, Collective, Numerics, QuantFormat, ReduceOp, SizeRange, Variant
from commplane.select.offers import ANY_DTYPE, Offer

__all__ = ["Route", "compile_routes", "has_mean", "has_norm", "in_class", "joined", "serves", "take"]


@dataclass(frozen=True)
class Route:
    """``low <= bytes < high`` of one (collective, op, dtype) go to one backend. `high` None means without limit.

    Of `all_reduce_rms_norm_quant` the op is the format.

    `algorithm` is what the backend says it runs there, if it does.
    """

    collective: Collective
    op: Variant | None
    dtype: str
    low: int
    high: int | None
    backend: str
    algorithm: str = ""

    @property
    def label(self) -> str:
        """The backend, and its algorithm where that has a name."""
        return f"{self.backend} {self.algorithm}".rstrip()

    def serves(self, nbytes: int) -> bool:
        """Whether a message of this size goes here."""
        return self.low <= nbytes and (self.high is None or nbytes < self.high)

    def to_json(self) -> list[Any]:
        """As a list; the algorithm stands at the end where there is one."""
        out = [str(self.collective), self.op and str(self.op), self.dtype, self.low, self.high, self.backend]
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


def compile_routes(
    specs: Sequence[BackendSpec], numerics: str = "any", offers: Sequence[Offer] = (), *, capturing: bool = False
) -> tuple[Route, ...]:
    """Cut the sizes of each (collective, op, dtype) into ranges, the first backend that covers a size winning. Pure.

    Ranges, not one threshold a backend: the best backend is not monotone in size. A backend covers what its spec says, and of
    that only what it offers where it has an offer.
    """
    offered = {(o.backend, o.collective, o.dtype): o.ranges for o in offers if o.capturing is capturing}
    routes: list[Route] = []
    for collective in Collective:
        serving = [s for s in specs if collective in s.collectives()]
        named = sorted({d for s in serving for d in s.dtypes})
        dtypes = [ANY_DTYPE] if collective is Collective.BARRIER else [*named, ANY_DTYPE]
        for op in collective.variants:
            for dtype in dtypes:
                free: list[tuple[int, int | None]] = [(0, None)]
                for spec in serving:
                    if not serves(spec, op):
                        continue
                    if collective.combines and not in_class(spec, numerics):
                        continue
                    if collective is not Collective.BARRIER and spec.dtypes and dtype not in spec.dtypes:
                        continue
                    if op is ReduceOp.AVG and not has_mean(dtype):
                        continue
                    if collective.norms and not has_norm(dtype):
                        continue
                    low, high = spec.min_bytes, None if spec.max_bytes is None else spec.max_bytes + 1
                    if collective is Collective.BARRIER:  # has no size
                        low, high = 0, None
                    ranges = offered.get((spec.name, collective, dtype if spec.dtypes else ANY_DTYPE))
                    for part in [SizeRange(low, high)] if ranges is None else _within(ranges, low, high):
                        taken, free = take(free, part.low, part.high)
                        routes.extend(Route(collective, op, dtype, a, b, spec.name, part.algorithm) for a, b in taken)
    return tuple(joined(sorted(routes, key=lambda r: (str(r.collective), str(r.op), r.dtype, r.low))))


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
