"""The data plane's table: one lookup, one bound call. No hook, no environment, no log."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

from commplane.api import Collective, QuantFormat, ReduceOp, add_rms_norm, quantize
from commplane.errors import CommplaneError
from commplane.flight import Bindable
from commplane.select import Plan, Route

__all__ = ["Call", "DeadTable", "DispatchTable", "RecordingTable", "tables"]

Call = Callable[..., Any]
Key = tuple[str, Any, Any]

IN_PLACE = {"all_reduce_": Collective.ALL_REDUCE, "all_reduce_rms_norm_": Collective.ALL_REDUCE_RMS_NORM}
"""Names of the in-place calls in the table; the other entries are named like their collective."""


def _by_size(routes: list[Route], calls: list[Call], refuse: Callable[[int | None], CommplaneError]) -> Call:
    """A callable that picks by the tensor's bytes. With one for all sizes it is the bound callable itself.

    Neighbours with one callable are one: which algorithm of a backend runs is decided inside of its call.
    """
    spans: list[tuple[int, int | None, Call]] = []
    for route, call in zip(routes, calls, strict=True):
        if spans and spans[-1][1:] == (route.low, call):
            spans[-1] = spans[-1][0], route.high, call
        else:
            spans.append((route.low, route.high, call))
    if len(spans) == 1 and spans[0][:2] == (0, None):
        return spans[0][2]
    starts: list[int] = []
    table: list[Call] = []

    def gap(tensor: Any, *_args: Any) -> Any:
        raise refuse(tensor.nbytes)

    end: int | None = 0
    for low, high, call in spans:
        if end is not None and end < low:
            starts.append(end)
            table.append(gap)
        starts.append(low)
        table.append(call)
        end = high
    if end is not None:
        starts.append(end)
        table.append(gap)

    def call_by_size(tensor: Any, *args: Any) -> Any:
        return table[bisect_right(starts, tensor.nbytes) - 1](tensor, *args)

    return call_by_size


def _compose_norm(all_reduce: Call) -> Call:
    """`all_reduce_rms_norm` from an out-of-place all-reduce of some backend, and torch for the rest."""

    def all_reduce_rms_norm(tensor: Any, residual: Any, weight: Any, eps: float, weight_bias: float) -> Any:
        return add_rms_norm(all_reduce(tensor), residual, weight, eps, weight_bias)

    return all_reduce_rms_norm


def _compose_norm_in_place(all_reduce_: Call) -> Call:
    """The same into `tensor` and `residual`, from an in-place all-reduce."""

    def all_reduce_rms_norm_(tensor: Any, residual: Any, weight: Any, eps: float, weight_bias: float) -> Any:
        norm, total = add_rms_norm(all_reduce_(tensor), residual, weight, eps, weight_bias)
        residual.detach().copy_(total)
        tensor.detach().copy_(norm)
        return tensor, residual

    return all_reduce_rms_norm_


def _compose_quant(norm_call: Call) -> Call:
    """`all_reduce_rms_norm_quant` from the norm of some backend, or a composed one, and torch for the rest."""

    def all_reduce_rms_norm_quant(
        tensor: Any, residual: Any, weight: Any, eps: float, weight_bias: float, how: Any, keep_norm: bool
    ) -> Any:
        norm, total = norm_call(tensor, residual, weight, eps, weight_bias)
        return quantize(norm, how), norm if keep_norm else None, total

    return all_reduce_rms_norm_quant


class DispatchTable(dict[Key, Call]):
    """(call, op, torch dtype) -> callable, filled from the plan when a key is first met.

    Args:
        who: how errors begin.
        plan: what runs where.
        backends: what to bind, by name.
        capturing: whether it is for the calls inside of captures, whose routes may be others.
    """

    def __init__(self, who: str, plan: Plan, backends: Mapping[str, Bindable], *, capturing: bool = False) -> None:
        super().__init__()
        self._who = who
        self._plan = plan
        self._backends = backends
        self._capturing = capturing

    def __missing__(self, key: Key) -> Call:
        name, op, dtype = key
        collective, in_place = IN_PLACE.get(name) or Collective(name), name in IN_PLACE
        dtype_name = str(dtype).removeprefix("torch.")

        def refuse(nbytes: int | None = None) -> CommplaneError:
            return self._plan.unsupported(self._who, collective, op, dtype_name, nbytes, capturing=self._capturing)

        if op is not None and op not in collective.variants:
            raise refuse()
        kind = QuantFormat if collective is Collective.ALL_REDUCE_RMS_NORM_QUANT else ReduceOp
        variant = None if op is None else kind(op)
        routes = self._plan.serving(collective, variant, dtype_name, capturing=self._capturing)
        if not routes:
            raise refuse()
        # One of each: which algorithm of a backend runs is decided inside of its call.
        made = {r.candidate: self._made(r, dtype, in_place=in_place) for r in {r.candidate: r for r in routes}.values()}
        self[key] = call = _by_size(routes, [made[r.candidate] for r in routes], refuse)
        return call

    def _made(self, route: Route, dtype: Any, *, in_place: bool) -> Call:
        """What a route calls: a backend, or around its part what torch does."""
        call = self._bind(route.of_part(), dtype, in_place=in_place)
        if route.part is Collective.ALL_REDUCE:
            call = _compose_norm_in_place(call) if in_place else _compose_norm(call)
        if route.part is not None and route.collective is Collective.ALL_REDUCE_RMS_NORM_QUANT:
            call = _compose_quant(call)
        return call

    def _bind(self, route: Route, dtype: Any, *, in_place: bool) -> Call:
        op = None if isinstance(route.op, QuantFormat) else route.op  # a format is an argument of the call
        return self._backends[route.backend].bind(route.collective, op, dtype, in_place=in_place)


def tables(who: str, plan: Plan, backends: Mapping[str, Bindable]) -> tuple[DispatchTable, DispatchTable]:
    """The tables for calls outside of captures and inside, which are one where the plan knows no difference."""
    live = DispatchTable(who, plan, backends)
    return live, live if plan.captured is None else DispatchTable(who, plan, backends, capturing=True)


def _beside_the_tensor(name: str, args: tuple[Any, ...]) -> str:
    """What has to be equal on all ranks beside the size of the tensor."""
    if name == Collective.BROADCAST:
        return f" src={args[1]}"
    if name.startswith(Collective.ALL_REDUCE_RMS_NORM):
        _, _, weight, eps, weight_bias, *quant = args
        how = f" {quant[0].label} keep_norm={quant[1]}" if quant else ""
        return f" hidden={weight.shape[0]} eps={float(eps)} weight_bias={float(weight_bias)}{how}"
    return ""


class RecordingTable(dict[Key, Call]):
    """The table while a capture is open: calls go through and leave a line that the ranks compare afterwards."""

    def __init__(self, live: DispatchTable) -> None:
        super().__init__()
        self._live = live
        self.records: list[str] = []

    def __missing__(self, key: Key) -> Call:
        call = self._live[key]
        name, op, dtype = key
        label = f"{name}({op or ''} {dtype or ''}".replace("( ", "(").strip()

        def record(*args: Any) -> Any:
            size = f" {args[0].nbytes} bytes" if args else ""
            self.records.append(f"{label}{size}{_beside_the_tensor(name, args)})")
            return call(*args)

        self[key] = record
        return record


class DeadTable(dict[Key, Call]):
    """The table of a communicator that is closed or poisoned: every call raises at once."""

    def __init__(self, make: Callable[[], CommplaneError]) -> None:
        super().__init__()
        self.error = make
        """What every call raises."""

    def __missing__(self, key: Key) -> Call:
        raise self.error()
