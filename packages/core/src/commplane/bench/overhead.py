"""What lies between the user's call and the native call: the same all-reduce sum through each layer, all layers taking turns.

A small message, so that most of the time is the call itself. Over several ranks each call also waits for the slowest rank; the
layers alone are seen on `NullBackend`, a group of one rank without a transport. On a GPU it is the time until a call returns.

The loops below are written out, one a layer, because a loop over a callable would add a call of its own to what it times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

from commplane.api import ReduceOp
from commplane.bench.affinity import core_of, pinned
from commplane.bench.cases import Step
from commplane.bench.null import NAME as NULL
from commplane.bench.null import NullPlugin
from commplane.bench.timing import TURN_S
from commplane.plugins import core_version

if TYPE_CHECKING:
    import torch

    from commplane.runtime import Communicator, Plane

__all__ = ["CALLS", "OverheadRow", "Spread", "Subject", "form_null", "measure_overhead"]

CALLS = {
    "bare": "native call alone",
    "all_reduce_": "comm.all_reduce_(x)",
    "all_reduce": "comm.all_reduce(x)",
    "ops.all_reduce_": "torch.ops.commplane.all_reduce_",
    "ops.all_reduce": "torch.ops.commplane.all_reduce",
}
"""The layers, from the inside out, by their name in a row, as people read them."""

# A block of calls is timed as one, so that the clock's own cost is spread over it; and bounds on the calls of one.
_BLOCK_S = 20e-6
_MAX_CALLS, _MAX_BLOCKS, _MIN_BLOCKS = 100, 500, 5

Loop = Callable[[int], None]


@dataclass(frozen=True)
class Spread:
    """Nanoseconds a call: quartiles over the rounds, each of the slowest rank."""

    low_ns: float
    median_ns: float
    high_ns: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a round. Pure."""
        found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(*(round(v, 1) for v in found))

    @property
    def noise(self) -> bool:
        """Of a difference: more than a quarter of the rounds above 0, and more than a quarter below."""
        return self.low_ns < 0 < self.high_ns


@dataclass(frozen=True)
class OverheadRow:
    """One layer of one communicator.

    Attributes:
        backend: its name; ``null`` is no transport, in a group of one rank.
        call: a key of `CALLS`.
        flight_records: whether calls were recorded.
        pinned: whether each rank's threads were on one core.
        op: the reduction.
        dtype: torch's name.
        bytes: of this rank's tensor.
        ranks: of the communicator.
        device: ``cpu`` or ``cuda``.
        iterations: counted calls.
        time: of a call; in a round, the median over its blocks of calls.
        over_bare: how much more than ``bare`` on the same communicator in the same round; None where there is no such call.
        over_unrecorded: how much more than the same call of the same backend without flight records in the same round; None
            where this one has none, or that one was not measured.
    """

    backend: str
    call: str
    flight_records: bool
    pinned: bool
    op: str
    dtype: str
    bytes: int
    ranks: int
    device: str
    iterations: int
    time: Spread
    over_bare: Spread | None
    over_unrecorded: Spread | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names."""
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """A communicator whose layers are measured, and whether its calls leave flight records."""

    backend: str
    communicator: Communicator
    flight_records: bool


@dataclass(frozen=True)
class _Runner:
    """One layer of one subject, and where its turns run."""

    subject: Subject
    call: str
    loop: Loop
    core: int | None

    @property
    def key(self) -> tuple[str, str, bool, int | None]:
        """What tells it from the others."""
        return self.subject.backend, self.call, self.subject.flight_records, self.core

    def turn(self, calls: int, blocks: int) -> float:
        """Median nanoseconds a call over `blocks` timed blocks, after a barrier and an uncounted block. Collective."""
        loop, clock = self.loop, time.perf_counter_ns
        spent = [0] * blocks
        with nullcontext() if self.core is None else pinned(self.core):
            self.subject.communicator.barrier()
            loop(calls)
            for i in range(blocks):
                begin = clock()
                loop(calls)
                spent[i] = clock() - begin
        return statistics.median(spent) / calls


def form_null(plane: Plane, device: str | None = None) -> Communicator:
    """A group of this rank alone whose backend does nothing, with everything above it as in any other group. Local."""
    if NULL not in plane.plugins.backends():
        plane.plugins.register(NullPlugin(), NULL, dist="commplane", version=core_version())
    return plane.communicator("overhead_null", [plane.rank], device=device, backends=[NULL])


def measure_overhead(
    plane: Plane,
    subjects: Sequence[Subject],
    step: Step,
    *,
    pin: Sequence[bool],
    rounds: int,
    progress: Callable[[str], None] = lambda _text: None,
) -> list[OverheadRow]:
    """Time every layer of every subject. Collective over all ranks of `plane`; every rank returns the same rows.

    Args:
        plane: whose ranks take part.
        subjects: communicators over all ranks, or over one, in the same order on every rank; one whose backend does not serve
            the dtype is left out.
        step: an in-place all-reduce sum, from `steps`.
        pin: whether to measure pinned, not pinned, or one after the other.
        rounds: counted rounds; one before them is not counted.
        progress: told what is being measured.
    """
    import torch

    kind: torch.dtype = getattr(torch, str(step.dtype))
    core = core_of(plane.facts, plane.rank)
    runners = []
    for subject in subjects:
        comm = subject.communicator
        if comm.plan.explain(nbytes=step.nbytes, dtype=step.dtype).chosen != subject.backend.partition(":")[0]:
            continue
        comm.prepare("all_reduce", dtype=kind, max_bytes=step.nbytes)
        tensor = torch.empty(step.count, dtype=kind, device=comm.device).zero_()
        loops = _loops(subject, tensor)
        runners += [_Runner(subject, call, loop, core if on else None) for on in pin for call, loop in loops.items()]
    progress(f"calibration of {len(runners)} calls")
    sizes = _agree(plane, runners)
    mine: list[list[float]] = []
    for number in range(rounds + 1):
        progress(f"[{number + 1}/{rounds + 1}] {'round' if number else 'uncounted round'} of {len(runners)} calls")
        turns = [runner.turn(*size) for runner, size in zip(runners, sizes, strict=True)]
        mine += [turns] if number else []
    everyone = plane.gather(mine, what="bench overhead results")
    slowest = [[max(rank[n][i] for rank in everyone) for n in range(rounds)] for i in range(len(runners))]
    found = {r.key: times for r, times in zip(runners, slowest, strict=True)}
    return [
        OverheadRow(
            backend=r.subject.backend,
            call=r.call,
            flight_records=r.subject.flight_records,
            pinned=r.core is not None,
            op=str(ReduceOp.SUM),
            dtype=str(step.dtype),
            bytes=step.nbytes,
            ranks=r.subject.communicator.world_size,
            device=r.subject.communicator.key.device,
            iterations=rounds * calls * blocks,
            time=Spread.of(times),
            over_bare=difference(times, found.get((r.subject.backend, "bare", r.subject.flight_records, r.core))),
            over_unrecorded=(
                difference(times, found.get((r.subject.backend, r.call, False, r.core))) if r.subject.flight_records else None
            ),
        )
        for r, times, (calls, blocks) in zip(runners, slowest, sizes, strict=True)
    ]


def difference(times: Sequence[float], others: Sequence[float] | None) -> Spread | None:
    """What `times` are more than `others`, round by round, so that a slow round does not count. Pure."""
    return None if others is None else Spread.of([t - o for t, o in zip(times, others, strict=True)])


def _agree(plane: Plane, runners: Sequence[_Runner]) -> list[tuple[int, int]]:
    """Calls in a block and blocks in a turn for each runner, the same on every rank, from an uncounted pass. Collective."""
    estimates = [runner.turn(1, _MIN_BLOCKS) for runner in runners]
    everyone = plane.gather(estimates, what="bench calibration")
    return [turn_size(max(rank[i] for rank in everyone) / 1e9) for i in range(len(runners))]


def turn_size(seconds: float) -> tuple[int, int]:
    """Calls in a block and blocks in a turn when one call takes `seconds`. Pure."""
    calls = int(min(_MAX_CALLS, max(1, _BLOCK_S / max(seconds, 1e-9))))
    return calls, int(min(_MAX_BLOCKS, max(_MIN_BLOCKS, TURN_S / max(calls * seconds, 1e-9))))


def _loops(subject: Subject, tensor: torch.Tensor) -> dict[str, Loop]:
    """Each layer of one communicator as a loop of calls."""
    import torch

    import commplane.ops  # noqa: F401  registers the operators

    comm = subject.communicator
    backend = next(
        b for name, b in zip(comm.plan.backends, comm.backends, strict=True) if name == subject.backend.partition(":")[0]
    )
    bare = backend.bare(tensor, ReduceOp.SUM)

    def native(n: int, call: Callable[[], object] | None = bare) -> None:
        assert call is not None
        for _ in repeat(None, n):
            call()

    def in_place(n: int, x: torch.Tensor = tensor) -> None:
        for _ in repeat(None, n):
            comm.all_reduce_(x)

    def out_of_place(n: int, x: torch.Tensor = tensor) -> None:
        for _ in repeat(None, n):
            comm.all_reduce(x)

    handle, op_, op = comm.handle, torch.ops.commplane.all_reduce_.default, torch.ops.commplane.all_reduce.default

    def in_place_operator(n: int, x: torch.Tensor = tensor) -> None:
        for _ in repeat(None, n):
            op_(x, "sum", handle)

    def operator(n: int, x: torch.Tensor = tensor) -> None:
        for _ in repeat(None, n):
            op(x, "sum", handle)

    loops: dict[str, Loop] = {} if bare is None else {"bare": native}
    return loops | {
        "all_reduce_": in_place,
        "all_reduce": out_of_place,
        "ops.all_reduce_": in_place_operator,
        "ops.all_reduce": operator,
    }
