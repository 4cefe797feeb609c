"""Latency of collectives, all candidates taking turns.

Absolute times on a shared machine move; ratios within one run hold. So in each round every candidate has its turn, pinned and
not, the first round is not counted (first touch of memory, cold caches), and what is reported is the median over all counted
calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from commplane.api import Collective
from commplane.bench.affinity import core_of
from commplane.bench.cases import Case, Step, make_cases, own_group
from commplane.bench.graphs import Captured, capture
from commplane.bench.timing import Runner, agree_on_calls, beginning, p99, take_turn
from commplane.errors import CommplaneError, ConfigError, UnsupportedOperation

if TYPE_CHECKING:
    from commplane.runtime import Communicator, Plane

__all__ = ["Row", "measure", "pinnings", "steps"]


@dataclass(frozen=True)
class Row:
    """One line of the result. Times are of the slowest rank, in microseconds a collective.

    Attributes:
        collective: its name.
        op: the reduction, or None where there is none.
        backend: its name, with ``:`` and an algorithm behind where that was asked for.
        mode: ``staged`` for an ordinary tensor, ``symmetric`` for one from `Communicator.empty`; of all_reduce_rms_norm
            ``fused`` or ``pair``, with `` symmetric`` behind.
        in_place: whether the result is written to the input.
        pinned: whether each rank's threads were on one core.
        dtype: torch's name; None for a barrier.
        bytes: of this rank's input tensor.
        hidden: its last dimension for all_reduce_rms_norm, else None.
        ranks: of a group.
        groups: how many of them made their calls at once.
        device: ``cpu`` or ``cuda``.
        graph: measured in a replayed CUDA graph, as device time.
        median_us: over all counted calls.
        p99_us: over all counted calls.
        iterations: counted calls.
        vs_torch: median of `torch`, the better of pinned and not, divided by this one's, both of this run.
        vs_pair: of a fused row, the median of the same backend's unfused pair on the same kind of tensor, the better of pinned
            and not, divided by this one's.
        detail: of a fused call or a pair, which of the ways to write it was the fastest.
        algorithm: what the backend said that it runs at this size, or None where it has no name for it.
    """

    collective: str
    op: str | None
    backend: str
    mode: str
    in_place: bool
    pinned: bool
    dtype: str | None
    bytes: int
    hidden: int | None
    ranks: int
    device: str
    graph: bool
    median_us: float
    p99_us: float
    iterations: int
    vs_torch: float | None = None
    vs_pair: float | None = None
    detail: str | None = None
    algorithm: str | None = None
    groups: int = 1

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names."""
        return asdict(self)


def measure(
    plane: Plane,
    communicators: dict[str, Communicator],
    todo: Sequence[Step],
    *,
    pin: str | None = None,
    rounds: int = 7,
    graph: bool = False,
    progress: Callable[[str], None] = lambda _text: None,
    left_out: Callable[[str], None] = lambda _text: None,
) -> list[Row]:
    """Time each step on each backend. Collective over all ranks; every rank returns the same rows.

    Args:
        plane: over which ranks.
        communicators: those to compare by backend, from `form`, on each rank of its group.
        todo: from `steps`.
        pin: ``on``, ``off`` or ``both``; see `pinnings` for None.
        rounds: counted rounds.
        graph: replays of CUDA graphs are timed, for communicators on cuda.
        progress: told what is being measured.
        left_out: told on every rank alike which candidate could not be captured, at what and why. One whose communicator
            cannot be used after that is left out of the later steps too.

    Raises:
        UnsupportedOperation: no backend does a step.
    """
    rows: list[Row] = []
    ways = pinnings(plane, communicators.values(), pin)
    for i, step in enumerate(todo):
        progress(f"[{i + 1}/{len(todo)}] {step}")
        usable = {name: comm for name, comm in communicators.items() if _usable(comm)}
        cases = make_cases(plane, usable, step, graph=graph)
        if not cases:
            raise UnsupportedOperation(f"bench: no backend serves {step}")
        graphs: dict[int, Captured] = {}
        for number, case in enumerate(cases if graph else ()):
            if not _usable(case.communicator):  # its other kind of tensor could not be captured
                continue
            made = capture(plane, case.communicator, case.call)
            if isinstance(made, Captured):
                graphs[number] = made
            else:
                left_out(f"{case.backend} {case.mode}, {step}: cannot be captured: {made}")
                if not _usable(case.communicator):  # left open, it would stop every other capture of the plane
                    case.communicator.close()
        taking = [(case, graphs.get(number)) for number, case in enumerate(cases) if number in graphs or not graph]
        rows.extend(_measure_one(plane, taking, step, ways, rounds) if taking else ())
    return rows


def _usable(communicator: Communicator) -> bool:
    try:
        communicator.check_usable("bench")
    except CommplaneError:  # a capture that failed has poisoned it, on every rank
        return False
    return True


def steps(
    plane: Plane,
    *,
    collectives: Sequence[Collective],
    op: str,
    dtypes: Sequence[str],
    sizes: Sequence[int],
    hidden: int,
    out_of_place: bool = False,
    groups: int = 1,
) -> list[Step]:
    """What to measure, in order; sizes that come to the same number of elements once. Local.

    For `groups` see `own_group`.

    Raises:
        ConfigError: a dtype that torch does not have, or that the collective does not take; a collective that is not measured
            here; ranks that do not make such groups.
    """
    import torch

    ranks = len(own_group(plane, groups))
    if Collective.ALL_REDUCE_RMS_NORM_QUANT in collectives:
        raise ConfigError("bench: all_reduce_rms_norm_quant is measured by commplane tune --op FORMAT, leave it out here")
    unknown = [d for d in dtypes if not isinstance(getattr(torch, d, None), torch.dtype)]
    if unknown:
        raise ConfigError(f"bench: torch has no dtype {', '.join(unknown)}")
    kinds = {d: getattr(torch, d) for d in dtypes}
    integers = [d for d, kind in kinds.items() if not kind.is_floating_point]
    if integers and Collective.ALL_REDUCE_RMS_NORM in collectives:
        raise ConfigError(f"bench: all_reduce_rms_norm wants floating-point dtypes, found {', '.join(integers)}")
    out = [
        Step.of(
            collective,
            op=op,
            dtype=dtype,
            nbytes=nbytes,
            itemsize=kind.itemsize,
            world_size=ranks,
            hidden=hidden,
            out_of_place=out_of_place,
        )
        for collective in collectives
        for dtype, kind in kinds.items()
        for nbytes in sizes
    ]
    return list(dict.fromkeys(out))


def pinnings(plane: Plane, communicators: Iterable[Communicator], pin: str | None) -> list[bool]:
    """Whether to measure pinned, not pinned, or both, in order of turns. Equal on all ranks, local.

    Without a choice: both where all tensors are on the CPU and no host has more ranks than cores, else not pinned.
    """
    if pin is None:
        on_cpu = all(c.key.device == "cpu" for c in communicators)
        pin = "both" if on_cpu and not plane.facts.oversubscribed(list(plane.facts)) else "off"
    return {"on": [True], "off": [False], "both": [True, False]}[pin]


def _measure_one(
    plane: Plane, cases: Sequence[tuple[Case, Captured | None]], step: Step, ways: Sequence[bool], rounds: int
) -> list[Row]:
    core = core_of(plane.facts, plane.rank)
    entries = [(case, on) for case, _ in cases for on in ways]
    begin = {case.communicator: beginning(plane, case.communicator) for case, _ in cases}
    runners = [
        Runner(c.communicator, c.call, core if on else None, graph, begin[c.communicator]) for c, graph in cases for on in ways
    ]
    calls = agree_on_calls(plane, runners)
    times: list[list[float]] = [[] for _ in runners]
    for number in range(rounds + 1):
        for i, runner in enumerate(runners):
            turn = take_turn(runner, calls[i])
            if number:
                times[i].extend(turn)
    mine = [(statistics.median(t) / c.times, p99(t) / c.times) for t, (c, _) in zip(times, entries, strict=True)]
    everyone = plane.gather(mine, what="bench results")
    rows = [
        Row(
            collective=str(step.collective),
            op=step.op,
            backend=case.backend,
            mode=case.mode,
            in_place=step.in_place,
            pinned=on,
            dtype=step.dtype,
            bytes=step.nbytes,
            hidden=step.hidden,
            ranks=case.communicator.world_size,
            groups=plane.world_size // case.communicator.world_size,
            device=case.communicator.key.device,
            graph=runners[i].graph is not None,
            median_us=round(max(result[i][0] for result in everyone), 3),
            p99_us=round(max(result[i][1] for result in everyone), 3),
            iterations=rounds * calls[i] * case.times,
            detail=case.detail,
            algorithm=case.algorithm,
        )
        for i, (case, on) in enumerate(entries)
    ]
    return compare(rows)


def compare(rows: Sequence[Row]) -> list[Row]:
    """`rows` of one step, with their ratios. Pure."""

    def ratio(row: Row, others: Sequence[Row]) -> float | None:
        return round(min(o.median_us for o in others) / row.median_us, 2) if others else None

    out = []
    for row in rows:
        reference = [r for r in rows if r.backend == "torch"]
        pair_mode = row.mode.replace("fused", "pair")
        pair = [r for r in rows if r.backend == row.backend and r.mode == pair_mode] if pair_mode != row.mode else []
        out.append(replace(row, vs_torch=ratio(row, reference), vs_pair=ratio(row, pair)))
    return out
