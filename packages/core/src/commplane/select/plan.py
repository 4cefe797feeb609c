"""What a group agreed on: which backend runs what, and why the others do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from commplane.api import BackendSpec, Capability, Collective, GroupKey, QuantFormat, ReduceOp, SizeRange, Variant
from commplane.errors import UnsupportedOperation
from commplane.select.offers import ANY_DTYPE, Offer, of_graphs
from commplane.select.routes import (
    Route,
    candidates,
    compile_routes,
    has_mean,
    has_norm,
    in_class,
    joined,
    ruled_out,
    serves,
    take,
)
from commplane.select.timings import Curve, Timings

__all__ = ["Candidate", "Explanation", "Plan"]


@dataclass(frozen=True)
class Candidate:
    """One backend and what became of it.

    Attributes:
        name: its name.
        dist: the distribution it came from, with version.
        state: ``"ready"``, or the step at which it was left out: ``"probe"``, ``"policy"``, ``"build"``, ``"canary"``.
        reason: why it was left out; empty when ready. Equal on every rank.
        facts: what the probes found, as text, where all ranks found the same; else each rank's.
    """

    name: str
    dist: str
    state: str
    reason: str = ""
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def ready(self) -> bool:
        """Whether it is in the plan."""
        return self.state == "ready"


@dataclass(frozen=True)
class Explanation:
    """Answer of `Plan.explain`; prints as text, `to_json` for machines.

    `algorithm` is what `chosen` says it runs for messages of `low` to below `high` bytes; empty where it says nothing.
    """

    question: str
    chosen: str | None
    others: tuple[tuple[str, str], ...]
    algorithm: str = ""
    low: int = 0
    high: int | None = None
    microseconds: float | None = None
    """What `chosen` takes where that was measured."""
    measured: str = ""
    """How that was: the hidden size, and where the times are from."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        bytes_ = [self.low, self.high] if self.algorithm else None
        return {
            "question": self.question,
            "chosen": self.chosen,
            "algorithm": self.algorithm or None,
            "bytes": bytes_,
            "others": dict(self.others),
            **({} if self.microseconds is None else {"microseconds": round(self.microseconds, 2), "measured": self.measured}),
        }

    def __str__(self) -> str:
        how = f" {self.algorithm}, {self.low} <= bytes < {self.high or 'inf'}" if self.algorithm else ""
        how += f", {self.microseconds:.1f} us" if self.microseconds is not None else ""
        how += f" ({self.measured})" if self.measured else ""
        lines = [f"{self.question}: {self.chosen or 'nothing in the plan serves this'}{how}"]
        lines.extend(f"  not {name}: {reason}" for name, reason in self.others)
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """The agreed outcome for one group: frozen, and equal on every rank, which `digest` proves.

    Attributes:
        key: the group.
        candidates: every backend and what became of it.
        routes: which sizes go where.
        specs: of the backends in use, in the order of preference.
        numerics: the class that the setting admits.
        captured: the routes of calls that are made while a capture is open; None where they are the same.
        offers: what the backends answered when they were asked for their sizes.
        timings: what candidates took where they were measured, which routes then follow; None without.
    """

    key: GroupKey
    candidates: tuple[Candidate, ...]
    routes: tuple[Route, ...]
    specs: tuple[BackendSpec, ...]
    numerics: str = "any"
    captured: tuple[Route, ...] | None = None
    offers: tuple[Offer, ...] = ()
    timings: Timings | None = None

    @classmethod
    def of(
        cls,
        key: GroupKey,
        candidates: Sequence[Candidate],
        specs: Sequence[BackendSpec],
        numerics: str = "any",
        offers: Sequence[Offer] = (),
        timings: Timings | None = None,
    ) -> Plan:
        """The plan of backends that were built. Pure."""
        routes = compile_routes(specs, numerics, offers, timings=timings)
        captured = None
        # A capture passes a group by in which nothing captures: its calls go the ordinary way.
        if (of_graphs(offers) or timings is not None) and any(Capability.CAPTURE in s.capabilities for s in specs):
            captured = compile_routes(specs, numerics, offers, capturing=True, timings=timings)
        captured = None if captured == routes else captured
        return cls(key, tuple(candidates), routes, tuple(specs), numerics, captured, tuple(offers), timings)

    def tuned(self, timings: Timings | None) -> Plan:
        """The same backends, with routes that follow `timings`. Pure."""
        return Plan.of(self.key, self.candidates, self.specs, self.numerics, self.offers, timings)

    def ways(self, collective: Collective, op: Variant | None, dtype: str, *, capturing: bool = False) -> dict[str, list[Route]]:
        """Every way to run a call by its label in `Timings`, in the order of preference, with the sizes that it covers."""
        out: dict[str, list[Route]] = {}
        for r in candidates(self.specs, collective, op, dtype, self.numerics, self.offers, capturing=capturing):
            out.setdefault(r.candidate, []).append(r)
        return {label: joined(sorted(routes, key=lambda r: r.low)) for label, routes in out.items()}

    def lacks(self, other: Plan) -> str | None:
        """A call and sizes that `other`, of the same backends, runs and this plan does not; None if there are none."""
        for capturing in (False, True):
            for r in other._routes(capturing):
                free = [(r.low, r.high)]
                for mine in self.serving(r.collective, r.op, r.dtype, capturing=capturing):
                    free = take(free, mine.low, mine.high)[1]
                for low, high in free:
                    dtype = "any other dtype" if r.dtype == ANY_DTYPE else r.dtype
                    size = f"{low} <= bytes{'' if high is None else f' < {high}'}"
                    return f"{r.collective}{'' if r.op is None else f' {r.op}'} of {dtype}, {size}"
        return None

    def only(self, routes: Sequence[Route]) -> Plan:
        """These backends with these routes alone, to try one way out. Pure."""
        return replace(self, routes=tuple(routes), captured=None)

    @cached_property
    def _ranges(self) -> dict[tuple[str, Collective, str, bool], tuple[SizeRange, ...]]:
        return {(o.backend, o.collective, o.dtype, o.capturing): o.ranges for o in self.offers}

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends in use, in the order of preference."""
        return tuple(c.name for c in self.candidates if c.ready)

    @property
    def digest(self) -> str:
        """Hash of everything above."""
        everything = [self.to_json(), [s.to_json() for s in self.specs], self.numerics, [o.to_json() for o in self.offers]]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]

    def serving(self, collective: Collective, op: Variant | None, dtype: str, *, capturing: bool = False) -> list[Route]:
        """The routes of one (collective, op, dtype), by size; those with a `part` are composed."""
        if collective.norms and not has_norm(dtype):
            return []
        wanted = (collective, op)
        routes = self._routes(capturing)
        exact = [r for r in routes if (r.collective, r.op) == wanted and r.dtype == dtype]
        return exact or [r for r in routes if (r.collective, r.op) == wanted and r.dtype == ANY_DTYPE]

    def find(self, collective: Collective, op: Variant | None, dtype: str, *, capturing: bool = False) -> list[Route]:
        """Those of `serving` where a backend has all of it."""
        return [r for r in self.serving(collective, op, dtype, capturing=capturing) if r.part is None]

    def _routes(self, capturing: bool) -> tuple[Route, ...]:
        return self.captured if capturing and self.captured is not None else self.routes

    def composed(self, collective: Collective, op: Variant | None, dtype: str, *, capturing: bool = False) -> list[Route]:
        """Those of `serving` where a backend has a part of it, each as the route of that part; torch does the rest there."""
        return [r.of_part() for r in self.serving(collective, op, dtype, capturing=capturing) if r.part is not None]

    def explain(
        self,
        collective: str = "all_reduce",
        *,
        nbytes: int = 0,
        dtype: Any = "float32",
        op: str = "sum",
        graph: bool = False,
    ) -> Explanation:
        """What runs for a message of `nbytes`, and why each other backend does not. Local, equal on every rank.

        `op` is a reduction, or of all_reduce_rms_norm_quant the format; other collectives do not look at it. `graph` asks for a
        call that is made while a capture is open.
        """
        if collective not in Collective._value2member_map_:
            raise UnsupportedOperation(f"explain wants one of {', '.join(Collective)}, found {collective!r}")
        kind = Collective(collective)
        name = str(dtype).removeprefix("torch.")
        reduction = _variant(kind, op)
        if reduction is None and kind.variants != (None,):
            raise UnsupportedOperation(f"explain {kind} wants one of {', '.join(map(str, kind.variants))}, found {op!r}")
        route = _serving(self.serving(kind, reduction, name, capturing=graph), nbytes)
        curves = self._curves(kind, reduction, name, graph)
        specs = {s.name: s for s in self.specs}
        others = []
        shown = set()
        timings = self.timings or Timings()
        for label, ways in self.ways(kind, reduction, name, capturing=graph).items() if timings.curves else ():
            failed = ruled_out(ways[0], timings, capturing=graph and self.captured is not None)
            if (label in curves or failed is not None) and (route is None or label != route.candidate):
                shown.add(label)
                others.append((_named(ways[0]), self._slower(ways, failed, route, curves, nbytes)))
        for c in self.candidates:
            if (route is not None and route.part is None and c.name == route.backend) or c.name in shown:
                continue
            if not c.ready:
                reason = f"{c.state}: {c.reason}"
            elif route is not None:
                before = f"{'was not measured, and ' if curves else ''}{route.how} comes before it"
                reason = self._why_not(specs[c.name], kind, reduction, name, nbytes, graph) or before
            else:
                reason = self._why_not_at_all(specs[c.name], kind, reduction, name, nbytes, graph)
            others.append((c.name, reason))
        parts = [str(reduction)] if reduction else []
        what = f"{kind}({', '.join([*parts, name, f'{nbytes} bytes'])}){' in a graph' if graph else ''} in {self.key}"
        if route is None:
            return Explanation(what, None, tuple(others))
        curve = curves.get(route.candidate)
        us, measured = (curve.at(nbytes), curve.measured) if curve is not None and curve.points else (None, "")
        if route.part is None:
            return Explanation(what, route.backend, tuple(others), route.algorithm, route.low, route.high, us, measured)
        return Explanation(what, route.how, tuple(others), microseconds=us, measured=measured)

    def _curves(self, collective: Collective, op: Variant | None, dtype: str, graph: bool) -> Mapping[str, Curve]:
        if self.timings is None:
            return {}
        return self.timings.of(collective, op, dtype, graph=graph and self.captured is not None)

    def _slower(
        self, ways: Sequence[Route], failed: Curve | None, chosen: Route | None, curves: Mapping[str, Curve], nbytes: int
    ) -> str:
        """Why a way to run a call that was measured, or failed, is not the chosen one."""
        if failed is not None and nbytes >= failed.failed_from:
            what = "" if failed.collective == ways[0].collective else f" as {failed.collective}"
            return f"failed{what} when it was tuned: {failed.failed}"
        if _serving(ways, nbytes) is None:
            return f"does not serve {nbytes} bytes"
        curve = curves.get(ways[0].candidate)
        if curve is None or not curve.points:
            return f"was not measured at {nbytes} bytes"
        mine = f"{curve.at(nbytes):.1f} us at {nbytes} bytes"
        best = None if chosen is None else curves.get(chosen.candidate)
        if chosen is None:
            return mine
        if best is None or not best.points:
            return f"{mine}, {chosen.how} comes before it and was not measured"
        what = chosen.backend if chosen.part is None else f"the pair of {chosen.backend} and torch"
        return f"{mine}, {what} takes {best.at(nbytes):.1f}"

    def unsupported(
        self,
        who: str,
        collective: Collective,
        op: str | None,
        dtype: str,
        nbytes: int | None = None,
        *,
        capturing: bool = False,
    ) -> UnsupportedOperation:
        """The error for a call that no route serves, with the reason of each backend."""
        specs = {s.name: s for s in self.specs}
        reduction = _variant(collective, op)
        if op is not None and reduction is None:
            return UnsupportedOperation(f"{who} {collective}: wanted op {', '.join(map(str, collective.variants))}, found {op!r}")
        call = (collective, reduction, dtype, nbytes or 0, capturing)
        reasons = [f"{n}: {self._why_not_at_all(specs[n], *call)}" for n in self.backends]
        size = "" if nbytes is None else f"{nbytes} bytes of "
        return UnsupportedOperation(
            f"{who} {collective} of {size}{dtype}{'' if reduction is None else f' with op {reduction}'} is served by no backend "
            f"of this group ({'; '.join(reasons)}): convert the tensor, or install a backend that serves it"
        )

    def _describe(self, collective: Collective, *, capturing: bool = False) -> list[str]:
        """One line for each backend, algorithm and range of sizes: what of `collective` runs there."""
        served: dict[tuple[str, int, int | None], tuple[set[str], set[str]]] = {}
        routes = [r for r in self._routes(capturing) if r.collective is collective]
        for r in routes:
            ops, dtypes = served.setdefault((r.label if r.part is None else r.how, r.low, r.high), (set(), set()))
            ops.add(str(r.op))
            dtypes.add(r.dtype)
        lines = []
        name = f"{collective} (graph)" if capturing else str(collective)
        for (label, low, high), (ops, dtypes) in sorted(served.items(), key=lambda item: item[0][1]):
            size = "" if (low, high) == (0, None) else f", {low} <= bytes < {high or 'inf'}"
            some = f" {', '.join(sorted(ops))}" if len(ops) < len(collective.variants) else ""
            what = "" if collective is Collective.BARRIER else f" {', '.join(sorted(dtypes))}"
            lines.append(f"{name:<20}{' ' * (len(name) >= 20)}{label:<11}{some}{what}{size}".rstrip())
        return lines

    def _why_not(
        self, spec: BackendSpec, collective: Collective, op: Variant | None, dtype: str, nbytes: int, capturing: bool
    ) -> str:
        """The declared limit of `spec` that a call is outside of, or an empty string."""
        if collective.norms and not has_norm(dtype):
            return f"{collective} wants a floating-point dtype, found {dtype}"
        if collective not in spec.collectives():
            return f"does not declare {collective}"
        if collective.combines and not in_class(spec, self.numerics):
            return "does not add in rank order, which the setting numerics=rank_order demands"
        if op is ReduceOp.AVG and not has_mean(dtype):
            return f"op avg wants a floating-point dtype, found {dtype}: use sum and divide"
        if not serves(spec, op):
            of = spec.formats if isinstance(op, QuantFormat) else spec.ops
            return f"serves {'format' if of is spec.formats else 'op'} {', '.join(sorted(map(str, of)))}, not {op}"
        if spec.dtypes and collective is not Collective.BARRIER and dtype not in spec.dtypes:
            return f"serves {', '.join(sorted(spec.dtypes))}, not {dtype}"
        if nbytes < spec.min_bytes:
            return f"is for messages from {spec.min_bytes} bytes"
        if spec.max_bytes is not None and nbytes > spec.max_bytes:
            return f"is for messages up to {spec.max_bytes} bytes"
        ranges = self._ranges.get((spec.name, collective, dtype if spec.dtypes else ANY_DTYPE, capturing))
        if ranges is not None and not any(nbytes in r for r in ranges):
            sizes = f"for {', '.join(map(str, ranges))} only" if ranges else "at no size"
            return f"offers {collective} of {dtype} {sizes}"
        return ""

    def _why_not_at_all(
        self, spec: BackendSpec, collective: Collective, op: Variant | None, dtype: str, nbytes: int, capturing: bool
    ) -> str:
        """`_why_not`, and why the collective cannot be composed of what `spec` has either."""
        reason = self._why_not(spec, collective, op, dtype, nbytes, capturing)
        if collective.norms and has_norm(dtype):
            part = self._why_not(spec, Collective.ALL_REDUCE, ReduceOp.SUM, dtype, nbytes, capturing)
            reason += f", nor can it be composed: {part}"
        return reason

    def to_json(self) -> dict[str, Any]:
        """A JSON object that is equal on every rank."""
        return {
            "group": {"ranks": list(self.key.ranks), "device": self.key.device, "purpose": self.key.purpose},
            "candidates": [
                {"name": c.name, "dist": c.dist, "state": c.state, "reason": c.reason, "facts": dict(c.facts)}
                for c in self.candidates
            ],
            "routes": [r.to_json() for r in self.routes],
            "captured": None if self.captured is None else [r.to_json() for r in self.captured],
            "timings": None if self.timings is None else self.timings.to_json(),
        }

    def __str__(self) -> str:
        lines = [f"plan {self.digest} of {self.key}"]
        for c in self.candidates:
            found = ", ".join(f"{key}={value}" for key, value in c.facts.items())
            detail = f"ready{found and f' ({found})'}" if c.ready else f"left out at {c.state}: {c.reason}"
            lines.append(f"  {c.name:<12} {c.dist:<28} {detail}")
        for collective in Collective:
            lines.extend(f"  {line}" for line in self._describe(collective))
            if self._of(collective, capturing=True) != self._of(collective, capturing=False):
                lines.extend(f"  {line}" for line in self._describe(collective, capturing=True))
        return "\n".join(lines)

    def _of(self, collective: Collective, *, capturing: bool) -> list[Route]:
        return [r for r in self._routes(capturing) if r.collective is collective]


def _serving(routes: Sequence[Route], nbytes: int) -> Route | None:
    return next((r for r in routes if r.serves(nbytes)), None)


def _named(way: Route) -> str:
    """How an explanation calls a way that is not taken."""
    return way.how if way.part is not None or not way.collective.norms else f"{way.backend} (fused)"


def _variant(collective: Collective, name: str | None) -> Variant | None:
    """What `name` is among the variants of `collective`; None where it has none, or not this one."""
    return next((v for v in collective.variants if v is not None and v == name), None)
