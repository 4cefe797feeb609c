"""What a group agreed on: which backend runs what, and why the others do not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from commplane.api import BackendSpec, Collective, GroupKey, Numerics, ReduceOp
from commplane.errors import UnsupportedOperation

__all__ = ["Candidate", "Explanation", "Plan", "Route", "compile_routes"]

ANY_DTYPE = "*"


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
class Route:
    """``low <= bytes < high`` of one (collective, op, dtype) go to one backend. `high` None means without limit."""

    collective: Collective
    op: ReduceOp | None
    dtype: str
    low: int
    high: int | None
    backend: str


@dataclass(frozen=True)
class Explanation:
    """Answer of `Plan.explain`; prints as text, `to_json` for machines."""

    question: str
    chosen: str | None
    others: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"question": self.question, "chosen": self.chosen, "others": dict(self.others)}

    def __str__(self) -> str:
        lines = [f"{self.question}: {self.chosen or 'nothing in the plan serves this'}"]
        lines.extend(f"  not {name}: {reason}" for name, reason in self.others)
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """The agreed outcome for one group: frozen, and equal on every rank, which `digest` proves."""

    key: GroupKey
    candidates: tuple[Candidate, ...]
    routes: tuple[Route, ...]
    specs: tuple[BackendSpec, ...]
    numerics: str = "any"

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends in use, in the order of preference."""
        return tuple(c.name for c in self.candidates if c.ready)

    @property
    def digest(self) -> str:
        """Hash of everything above."""
        everything = [self.to_json(), [s.to_json() for s in self.specs], self.numerics]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, collective: Collective, op: ReduceOp | None, dtype: str) -> list[Route]:
        """The routes of one (collective, op, dtype), by size."""
        if collective is Collective.ALL_REDUCE_RMS_NORM and not _has_norm(dtype):
            return []
        wanted = (collective, op)
        exact = [r for r in self.routes if (r.collective, r.op) == wanted and r.dtype == dtype]
        return exact or [r for r in self.routes if (r.collective, r.op) == wanted and r.dtype == ANY_DTYPE]

    def composed(self, dtype: str) -> list[Route]:
        """The sizes of `all_reduce_rms_norm` that no backend has whole and some backend can all-reduce.

        Each as the route of that all-reduce; torch does the rest there.
        """
        if not _has_norm(dtype):
            return []
        free: list[tuple[int, int | None]] = [(0, None)]
        for r in self.find(Collective.ALL_REDUCE_RMS_NORM, None, dtype):
            free = _take(free, r.low, r.high)[1]
        routes: list[Route] = []
        for r in self.find(Collective.ALL_REDUCE, ReduceOp.SUM, dtype):
            taken, free = _take(free, r.low, r.high)
            routes.extend(replace(r, low=low, high=high) for low, high in taken)
        return sorted(routes, key=lambda r: r.low)

    def explain(self, collective: str = "all_reduce", *, nbytes: int = 0, dtype: Any = "float32", op: str = "sum") -> Explanation:
        """What runs for a message of `nbytes`, and why each other backend does not. Local, equal on every rank."""
        if collective not in Collective._value2member_map_ or op not in ReduceOp._value2member_map_:
            raise UnsupportedOperation(
                f"explain wants one of {', '.join(Collective)} with op {', '.join(ReduceOp)}, found {collective!r} with {op!r}"
            )
        kind = Collective(collective)
        name = str(dtype).removeprefix("torch.")
        reduction = ReduceOp(op) if kind.reduces else None
        chosen = _serving(self.find(kind, reduction, name), nbytes)
        composed = None
        if chosen is None and kind is Collective.ALL_REDUCE_RMS_NORM:
            composed = _serving(self.composed(name), nbytes)
        specs = {s.name: s for s in self.specs}
        others = []
        for c in self.candidates:
            if c.name == chosen:
                continue
            if not c.ready:
                reason = f"{c.state}: {c.reason}"
            elif chosen or composed:
                reason = self._why_not(specs[c.name], kind, reduction, name, nbytes) or f"{chosen} comes before it"
            else:
                reason = self._why_not_at_all(specs[c.name], kind, reduction, name, nbytes)
            others.append((c.name, reason))
        parts = [str(reduction)] if reduction else []
        what = f"{kind}({', '.join([*parts, name, f'{nbytes} bytes'])}) in {self.key}"
        return Explanation(what, chosen or (composed and _composed_of(composed)), tuple(others))

    def unsupported(
        self, who: str, collective: Collective, op: str | None, dtype: str, nbytes: int | None = None
    ) -> UnsupportedOperation:
        """The error for a call that no route serves, with the reason of each backend."""
        specs = {s.name: s for s in self.specs}
        reduction = ReduceOp(op) if op in ReduceOp._value2member_map_ else None
        if op is not None and reduction is None:
            return UnsupportedOperation(f"{who} {collective}: wanted op {', '.join(map(str, ReduceOp))}, found {op!r}")
        reasons = [f"{n}: {self._why_not_at_all(specs[n], collective, reduction, dtype, nbytes or 0)}" for n in self.backends]
        size = "" if nbytes is None else f"{nbytes} bytes of "
        return UnsupportedOperation(
            f"{who} {collective} of {size}{dtype}{'' if reduction is None else f' with op {reduction}'} is served by no backend "
            f"of this group ({'; '.join(reasons)}): convert the tensor, or install a backend that serves it"
        )

    def _describe(self, collective: Collective) -> list[str]:
        """One line for each backend and range of sizes: what of `collective` runs there."""
        served: dict[tuple[str, int, int | None], tuple[set[str], set[str]]] = {}
        for r in self.routes:
            if r.collective is collective:
                ops, dtypes = served.setdefault((r.backend, r.low, r.high), (set(), set()))
                ops.add(str(r.op))
                dtypes.add(r.dtype)
        if collective is Collective.ALL_REDUCE_RMS_NORM:
            for dtype in sorted({r.dtype for r in self.routes}):
                for r in self.composed(dtype):
                    served.setdefault((_composed_of(r.backend), r.low, r.high), (set(), set()))[1].add(dtype)
        lines = []
        for (backend, low, high), (ops, dtypes) in sorted(served.items(), key=lambda item: item[0][1]):
            size = "" if (low, high) == (0, None) else f", {low} <= bytes < {high or 'inf'}"
            some = f" {', '.join(sorted(ops))}" if collective.reduces and len(ops) < len(ReduceOp) else ""
            what = "" if collective is Collective.BARRIER else f" {', '.join(sorted(dtypes))}"
            lines.append(f"{collective!s:<20}{backend:<11}{some}{what}{size}".rstrip())
        return lines

    def _why_not(self, spec: BackendSpec, collective: Collective, op: ReduceOp | None, dtype: str, nbytes: int) -> str:
        """The declared limit of `spec` that a call is outside of, or an empty string."""
        if collective is Collective.ALL_REDUCE_RMS_NORM and not _has_norm(dtype):
            return f"{collective} wants a floating-point dtype, found {dtype}"
        if collective not in spec.collectives():
            return f"does not declare {collective}"
        if collective.combines and not _in_class(spec, self.numerics):
            return "does not add in rank order, which the setting numerics=rank_order demands"
        if op is ReduceOp.AVG and not _has_mean(dtype):
            return f"op avg wants a floating-point dtype, found {dtype}: use sum and divide"
        if op is not None and op not in spec.ops:
            return f"serves op {', '.join(sorted(map(str, spec.ops)))}, not {op}"
        if spec.dtypes and collective is not Collective.BARRIER and dtype not in spec.dtypes:
            return f"serves {', '.join(sorted(spec.dtypes))}, not {dtype}"
        if nbytes < spec.min_bytes:
            return f"is for messages from {spec.min_bytes} bytes"
        if spec.max_bytes is not None and nbytes > spec.max_bytes:
            return f"is for messages up to {spec.max_bytes} bytes"
        return ""

    def _why_not_at_all(self, spec: BackendSpec, collective: Collective, op: ReduceOp | None, dtype: str, nbytes: int) -> str:
        """`_why_not`, and why the collective cannot be composed of what `spec` has either."""
        reason = self._why_not(spec, collective, op, dtype, nbytes)
        if collective is Collective.ALL_REDUCE_RMS_NORM and _has_norm(dtype):
            reason += f", nor can it be composed: {self._why_not(spec, Collective.ALL_REDUCE, ReduceOp.SUM, dtype, nbytes)}"
        return reason

    def to_json(self) -> dict[str, Any]:
        """A JSON object that is equal on every rank."""
        return {
            "group": {"ranks": list(self.key.ranks), "device": self.key.device, "purpose": self.key.purpose},
            "candidates": [
                {"name": c.name, "dist": c.dist, "state": c.state, "reason": c.reason, "facts": dict(c.facts)}
                for c in self.candidates
            ],
            "routes": [[str(r.collective), r.op and str(r.op), r.dtype, r.low, r.high, r.backend] for r in self.routes],
        }

    def __str__(self) -> str:
        lines = [f"plan {self.digest} of {self.key}"]
        for c in self.candidates:
            found = ", ".join(f"{key}={value}" for key, value in c.facts.items())
            detail = f"ready{found and f' ({found})'}" if c.ready else f"left out at {c.state}: {c.reason}"
            lines.append(f"  {c.name:<12} {c.dist:<28} {detail}")
        for collective in Collective:
            lines.extend(f"  {line}" for line in self._describe(collective))
        return "\n".join(lines)


def _has_mean(dtype: str) -> bool:
    """A mean of integers is no integer; torch refuses it too."""
    return not dtype.startswith(("int", "uint", "bool"))


def _has_norm(dtype: str) -> bool:
    """A norm of integers is none; that of complex numbers is not what this one is."""
    return dtype == ANY_DTYPE or dtype.startswith(("float", "bfloat"))


def _serving(routes: Sequence[Route], nbytes: int) -> str | None:
    return next((r.backend for r in routes if r.low <= nbytes and (r.high is None or nbytes < r.high)), None)


def _composed_of(backend: str) -> str:
    return f"composed of all_reduce by {backend} and torch"


def _in_class(spec: BackendSpec, numerics: str) -> bool:
    return numerics == "any" or spec.numerics is Numerics.RANK_ORDER


def compile_routes(specs: Sequence[BackendSpec], numerics: str = "any") -> tuple[Route, ...]:
    """Cut the sizes of each (collective, op, dtype) into ranges, the first backend that covers a size winning. Pure.

    Ranges, not one threshold a backend: the best backend is not monotone in size.
    """
    routes: list[Route] = []
    for collective in Collective:
        serving = [s for s in specs if collective in s.collectives()]
        ops: list[ReduceOp | None] = list(ReduceOp) if collective.reduces else [None]
        named = sorted({d for s in serving for d in s.dtypes})
        dtypes = [ANY_DTYPE] if collective is Collective.BARRIER else [*named, ANY_DTYPE]
        for op in ops:
            for dtype in dtypes:
                free: list[tuple[int, int | None]] = [(0, None)]
                for spec in serving:
                    if op is not None and op not in spec.ops:
                        continue
                    if collective.combines and not _in_class(spec, numerics):
                        continue
                    if collective is not Collective.BARRIER and spec.dtypes and dtype not in spec.dtypes:
                        continue
                    if op is ReduceOp.AVG and not _has_mean(dtype):
                        continue
                    if collective is Collective.ALL_REDUCE_RMS_NORM and not _has_norm(dtype):
                        continue
                    low, high = spec.min_bytes, None if spec.max_bytes is None else spec.max_bytes + 1
                    if collective is Collective.BARRIER:  # has no size
                        low, high = 0, None
                    taken, free = _take(free, low, high)
                    routes.extend(Route(collective, op, dtype, low, high, spec.name) for low, high in taken)
    return tuple(sorted(routes, key=lambda r: (str(r.collective), str(r.op), r.dtype, r.low)))


def _take(
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
