"""Tuning of one communicator: every way to run a call is verified, then timed at each size, all taking turns.

Absolute times on a shared machine move; ratios within one run hold. So all ways of one size have a turn in each round, the first
round is not counted, and what counts is the median of a rank's turns, of the slowest rank. Every decision is made from values
that all ranks have gathered, so the curves are the same on each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from statistics import median
from typing import TYPE_CHECKING, Any

from commplane.agree import StoreBootstrap, on_device, setback
from commplane.agree.device import settle
from commplane.api import Collective, QuantFormat, Quantization, ReduceOp, Variant, add_rms_norm, misquantized, quantize
from commplane.errors import CommunicatorError, UnsupportedOperation
from commplane.runtime.dispatch import DispatchTable
from commplane.select import Curve, Route

if TYPE_CHECKING:
    import torch

__all__ = ["Subject", "Tuner", "sizes_up_to", "subject_of"]

_ROUNDS = 5
_TURN_S = 0.01
_MAX_CALLS = 200
_CALLS_IN_GRAPH = 10
_WARM_UP = 3

Call = Callable[[], Any]
MakeTable = Callable[[Sequence[Route]], DispatchTable]
"""A dispatch table with these routes alone."""


def sizes_up_to(max_bytes: int) -> tuple[int, ...]:
    """Powers of two from 8 KiB, each twice the one before, and `max_bytes` itself. Pure."""
    out = [n for i in range(13, 63) if (n := 1 << i) < max_bytes]
    return (*out, max_bytes)


@dataclass(frozen=True)
class Subject:
    """What is tuned; equal on all ranks.

    Attributes:
        collective: `all_reduce`, or a norm after one.
        variant: the op or format.
        dtype: torch's name.
        sizes: bytes of a rank's tensor, ascending.
        hidden: last dimension of the tensor of a norm.
        graph: whether in CUDA graphs.
    """

    collective: Collective
    variant: Variant | None
    dtype: str
    sizes: tuple[int, ...]
    hidden: int
    graph: bool

    def to_json(self) -> dict[str, Any]:
        """A JSON object for the comparison of the ranks."""
        return {
            "collective": str(self.collective),
            "variant": self.variant and str(self.variant),
            "dtype": self.dtype,
            "sizes": list(self.sizes),
            "hidden": self.hidden,
            "graph": self.graph,
        }


def subject_of(
    who: str,
    device: str,
    collective: str,
    dtype: torch.dtype | str,
    max_bytes: int,
    sizes: Sequence[int] | None,
    hidden: int,
    op: str | None,
    graph: bool | None,
) -> Subject:
    """The arguments of `Communicator.tune`, checked. Local.

    Raises:
        UnsupportedOperation: what was given cannot be tuned.
    """
    import torch

    tunable = [c for c in Collective if c is Collective.ALL_REDUCE or c.norms]
    if collective not in tunable:
        raise UnsupportedOperation(f"{who} tune wants one of {', '.join(tunable)}, found {collective!r}")
    kind, name = Collective(collective), str(dtype).removeprefix("torch.")
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise UnsupportedOperation(f"{who} tune wants a dtype of torch, found {name!r}")
    wanted = op or str(kind.variants[0])
    variant = next((v for v in kind.variants if v is not None and v == wanted), None)
    if variant is None and (kind.variants != (None,) or op is not None):
        raise UnsupportedOperation(f"{who} tune of {kind} wants op {', '.join(map(str, kind.variants))}, found {op!r}")
    chosen = sizes_up_to(max_bytes) if sizes is None else tuple(sorted(set(sizes)))
    if not chosen or chosen[0] < 1:
        raise UnsupportedOperation(f"{who} tune wants sizes of 1 byte or more, found {list(chosen)}")
    if kind.norms:  # whole rows: what two sizes both come to is measured once
        row = hidden * getattr(torch, name).itemsize
        chosen = tuple(sorted({max(1, n // row) * row for n in chosen}))
    on_cuda = device.startswith("cuda")
    if graph and not on_cuda:
        raise UnsupportedOperation(f"{who} tune in graphs wants a communicator on cuda, found {device}: leave graph out")
    return Subject(kind, variant, name, chosen, hidden, on_cuda if graph is None else graph)


@dataclass
class _Way:
    label: str
    routes: Sequence[Route]
    points: list[tuple[int, float]] = field(default_factory=list)
    failed: str = ""


class Tuner:
    """Measures one `Subject`. Every method that communicates is collective over the group.

    Args:
        subject: what.
        ways: the ways to run it, by label, with the sizes that each covers.
        device: where the group's tensors are.
        bootstrap: control plane of the communicator.
        make_table: makes the table of one way.
        capturing: around the capture of a graph, where the plan needs that.
        timeout: seconds that one wait for a rank may take.
        check: raises where the communicator can no longer be used.
    """

    def __init__(
        self,
        subject: Subject,
        ways: dict[str, list[Route]],
        device: str,
        bootstrap: StoreBootstrap,
        make_table: MakeTable,
        capturing: Callable[[], Any],
        timeout: float,
        check: Callable[[], None],
    ) -> None:
        self._subject = subject
        self._ways = [_Way(label, routes) for label, routes in ways.items()]
        self._device = device
        self._bootstrap = bootstrap
        self._make_table = make_table
        self._capturing = capturing
        self._timeout = timeout
        self._check = check

    def run(self, budget_s: float) -> list[Curve]:
        """The curves; of ways that gave a wrong result or failed, why. Collective.

        Sizes are measured in turn until `budget_s` seconds have passed on the slowest rank: the first one always is.
        """
        begin = time.monotonic()
        for nbytes in self._subject.sizes:
            elapsed = max(self._gather(time.monotonic() - begin, "time spent"))
            if elapsed > budget_s and nbytes != self._subject.sizes[0]:
                break
            with on_device(self._device):
                self._measure(nbytes)
        s = self._subject
        variant = s.variant and str(s.variant)
        return [
            Curve(str(s.collective), variant, s.dtype, s.graph, w.label, () if w.failed else tuple(w.points), w.failed)
            for w in self._ways
            if w.points or w.failed
        ]

    def _gather(self, value: Any, what: str) -> list[Any]:
        return list(self._bootstrap.all_gather(value, what=f"tune, {what}", timeout=self._timeout))

    def _measure(self, nbytes: int) -> None:
        data = _Data(self._subject, nbytes, self._device, self._bootstrap.rank, self._bootstrap.world_size)
        taking: list[tuple[_Way, Callable[[int], float], int]] = []
        for way in self._ways:
            if way.failed or not any(r.serves(data.nbytes) for r in way.routes):
                continue
            table = self._make_table(way.routes)
            call = self._jointly(way, "verification", lambda table=table: data.verified(table))  # type: ignore[misc]
            if call is None:
                continue
            timer = self._jointly(way, "capture", lambda call=call: self._timer(call))  # type: ignore[misc]
            if timer is not None:
                seconds = max(self._gather(timer(1) / 1e6, "calibration"))
                taking.append((way, timer, max(1, min(_MAX_CALLS, int(_TURN_S / max(seconds, 1e-9))))))
        times: list[list[float]] = [[] for _ in taking]
        for number in range(_ROUNDS + 1):
            for i, (_, timer, calls) in enumerate(taking):
                took = timer(calls)
                if number:
                    times[i].append(took)
        everyone = self._gather([round(median(t), 3) for t in times], "results")
        for i, (way, _, _) in enumerate(taking):
            way.points.append((data.nbytes, max(0.001, *(rank[i] for rank in everyone))))

    def _jointly(self, way: _Way, what: str, act: Callable[[], Any]) -> Any:
        """What `act` gave, or None where it failed on some rank, which rules the way out on all of them. Collective.

        Raises:
            CommunicatorError: some ranks raised where others did not, so that they are no longer at the same point.
        """
        made, problem, in_step = None, None, True
        try:
            made = act()
        except Exception as error:
            problem, in_step = setback(error).text, isinstance(error, (_Wrong, UnsupportedOperation))
        everyone = self._gather([problem, in_step], f"{what} of {way.label}")
        found = {r: p for r, (p, _) in zip(self._bootstrap.ranks, everyone, strict=True) if p}
        if not found:
            return made
        self._check()
        if len(found) < len(everyone) and not all(stays for _, stays in everyone):
            raise CommunicatorError(f"tune, {what} of {way.label}: raised on some ranks only, which are now out of step: {found}")
        texts = dict.fromkeys(found.values())
        way.failed = "; ".join(f"rank {', '.join(str(r) for r in found if found[r] == t)}: {t}" for t in texts)
        return None

    def _timer(self, call: Call) -> Callable[[int], float]:
        """Microseconds a call of so many. Collective as the calls are."""
        if self._subject.graph:
            return self._replays(call)

        def timer(calls: int) -> float:
            for _ in repeat(None, _WARM_UP):
                call()
            settle(self._device)
            begin = time.perf_counter()
            for _ in repeat(None, calls):
                call()
            settle(self._device)
            return (time.perf_counter() - begin) / calls * 1e6

        return timer

    def _replays(self, call: Call) -> Callable[[int], float]:
        """`call` in a CUDA graph, some times over; what is timed is device time."""
        import torch

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in repeat(None, _WARM_UP):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Threads that transports keep may go on meanwhile: only this one is held to what a capture allows.
        with (
            self._capturing(),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            for _ in repeat(None, _CALLS_IN_GRAPH):
                call()

        def timer(calls: int) -> float:
            replays = max(1, calls // _CALLS_IN_GRAPH)
            graph.replay()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            for _ in repeat(None, replays):
                graph.replay()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) * 1000 / (replays * _CALLS_IN_GRAPH)

        return timer


class _Wrong(Exception):
    """A call came back on this rank with what it must not give."""


class _Data:
    """Tensors of one size and what comes out of them: integers small enough that every order of adding them is exact."""

    def __init__(self, subject: Subject, nbytes: int, device: str, rank: int, world_size: int) -> None:
        import torch

        self._subject = subject
        dtype = getattr(torch, subject.dtype)
        count = max(1, nbytes // dtype.itemsize)
        shape = [max(1, count // subject.hidden), subject.hidden] if subject.collective.norms else [count]
        numbers = torch.arange(torch.Size(shape).numel(), device=device).reshape(shape)
        self.rank_values = [((numbers * 7 + r * 5) % 4 - (0 if dtype is torch.uint8 else 1)).to(dtype) for r in range(world_size)]
        self.tensor = self.rank_values[rank].clone()
        self.residual = ((numbers * 3) % 5 - 2).to(dtype)
        self.weight = ((torch.arange(shape[-1], device=device) % 3) + 1).to(dtype)
        self.nbytes = self.tensor.nbytes
        scales = {QuantFormat.FP8_STATIC: 0.25, QuantFormat.NVFP4: 16.0}
        self.how = None
        if isinstance(subject.variant, QuantFormat):
            scale = scales.get(subject.variant)
            self.how = Quantization(subject.variant, None if scale is None else torch.tensor([scale], device=device))

    def verified(self, table: DispatchTable) -> Call:
        """A call without arguments, once it has given what it must. Collective.

        Raises:
            _Wrong: it gave something else.
        """
        import torch

        s = self._subject
        call = table[str(s.collective), s.variant and str(s.variant), self.tensor.dtype]
        norm = (self.tensor, self.residual, self.weight, 1e-6, 0.0)
        arguments: tuple[Any, ...] = (self.tensor,)
        if s.collective.norms:
            arguments = norm if self.how is None else (*norm, self.how, True)
        before = self.tensor.clone()
        got = call(*arguments)
        if not torch.equal(self.tensor, before):
            raise _Wrong("changed its input")
        total = _reduced(self.rank_values, s.variant)
        if s.collective is Collective.ALL_REDUCE:
            _equal("the result", got, total)
        else:
            wanted, new = add_rms_norm(total, self.residual, self.weight, 1e-6, 0.0)
            _equal("the residual", got[-1], new)
            found = got[0] if self.how is None else got[1]
            if not torch.allclose(found.double(), wanted.double(), rtol=2.5 * torch.finfo(wanted.dtype).eps, atol=1e-6):
                raise _Wrong(f"gave a wrong norm of {self.nbytes} bytes of {s.dtype}")
            if self.how is not None:
                problem = misquantized(got[0], quantize(found, self.how))
                if problem:
                    raise _Wrong(f"quantised wrongly: {problem}")
        timed = arguments if self.how is None else (*norm, self.how, False)
        return lambda: call(*timed)


def _reduced(values: Sequence[torch.Tensor], op: Variant | None) -> torch.Tensor:
    import torch

    wide = torch.stack([v.double() for v in values])
    if op is ReduceOp.MIN:
        return wide.amin(0).to(values[0].dtype)
    if op is ReduceOp.MAX:
        return wide.amax(0).to(values[0].dtype)
    return (wide.mean(0) if op is ReduceOp.AVG else wide.sum(0)).to(values[0].dtype)


def _equal(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    import torch

    if got.shape != wanted.shape or not torch.equal(got, wanted):
        wrong = int((got != wanted).sum()) if got.shape == wanted.shape else wanted.numel()
        raise _Wrong(f"gave {what} wrong at {wrong} of {wanted.numel()} elements")
