"""Latency of all-reduce, all candidates taking turns.

Absolute times on a shared machine move; ratios within one run hold. So in each round every candidate has its turn, the first
round is not counted (first touch of memory, cold caches), and what is reported is the median over all counted calls.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from commplane.errors import CommplaneWarning, ConfigError, UnsupportedOperation

if TYPE_CHECKING:
    import torch

    from commplane.runtime import Communicator, Plane

__all__ = ["Case", "Row", "measure"]

# Seconds of calls a candidate gets in one round, and bounds on the number of calls.
_TURN_S = 0.02
_MIN_CALLS, _MAX_CALLS = 3, 1000


@dataclass(frozen=True)
class Row:
    """One line of the result. Times are of the slowest rank, in microseconds a call.

    `vs_torch` is the torch backend's median divided by this one's, both of this run.
    """

    backend: str
    mode: str
    op: str
    dtype: str
    bytes: int
    ranks: int
    device: str
    graph: bool
    median_us: float
    p99_us: float
    iterations: int
    vs_torch: float | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names."""
        return asdict(self)


@dataclass
class Case:
    """One candidate: a communicator with one backend, and the kind of tensor it is given."""

    backend: str
    mode: str
    communicator: Communicator


def measure(
    plane: Plane,
    *,
    sizes: Sequence[int],
    dtypes: Sequence[str],
    backends: Sequence[str] | None = None,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda _text: None,
) -> list[Row]:
    """Time in-place all-reduce sums over all ranks. Collective; every rank returns the same rows.

    Args:
        plane: over which ranks.
        sizes: bytes a rank.
        dtypes: names such as ``"bfloat16"``.
        backends: which to compare; `torch` is always among them. If unset, all that are usable.
        rounds: counted rounds.
        progress: told what is being measured.

    Raises:
        ConfigError: a backend asked for by name cannot serve these ranks.
    """
    cases = _cases(plane, backends)
    rows = []
    steps = [(dtype, nbytes) for dtype in dtypes for nbytes in sizes]
    for i, (dtype, nbytes) in enumerate(steps):
        progress(f"[{i + 1}/{len(steps)}] {dtype} {nbytes} bytes")
        rows.extend(_measure_one(plane, cases, dtype, nbytes, rounds))
    for communicator in dict.fromkeys(c.communicator for c in cases):
        communicator.close()
    return rows


def _cases(plane: Plane, backends: Sequence[str] | None) -> list[Case]:
    wanted = ["torch", *(n for n in (plane.plugins.backends() if backends is None else backends) if n != "torch")]
    cases = []
    for name in wanted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CommplaneWarning)  # said below, as an error if it was asked for
            comm = plane.communicator(f"bench_{name}", backends=[name])
        if comm.plan.backends[0] != name:
            refusal = next((c.reason for c in comm.plan.candidates if c.name == name), "unknown")
            comm.close()
            if backends is not None:
                raise ConfigError(f"bench: backend {name!r} cannot serve these ranks: {refusal}")
            continue
        cases.append(Case(name, "staged", comm))
        if any(s.name == name and "symmetric_memory" in map(str, s.capabilities) for s in comm.plan.specs):
            cases.append(Case(name, "symmetric", comm))
    return cases


def _measure_one(plane: Plane, cases: Sequence[Case], dtype: str, nbytes: int, rounds: int) -> list[Row]:
    import torch

    kind = getattr(torch, dtype)
    count = max(1, nbytes // kind.itemsize)
    live: list[tuple[Case, torch.Tensor]] = []
    for case in cases:
        comm = case.communicator
        if comm.plan.explain(nbytes=count * kind.itemsize, dtype=dtype).chosen != case.backend:
            continue
        comm.prepare("all_reduce", dtype=kind, max_bytes=count * kind.itemsize)
        symmetric = case.mode == "symmetric"
        tensor = comm.empty(count, dtype=kind) if symmetric else torch.empty(count, dtype=kind, device=comm.device)
        live.append((case, tensor.zero_()))  # zeros stay zeros, however often they are summed
    if not live:
        raise UnsupportedOperation(f"bench: no backend reduces {dtype}")
    calls = [_calls_per_turn(case, tensor, plane) for case, tensor in live]
    times: list[list[float]] = [[] for _ in live]
    for _round in range(rounds):
        for i, (case, tensor) in enumerate(live):
            times[i].extend(_turn(case, tensor, calls[i]))
    mine = [(statistics.median(t), _p99(t)) for t in times]
    everyone = plane.gather(mine, what="bench results")
    medians = [max(result[i][0] for result in everyone) for i in range(len(live))]
    p99s = [max(result[i][1] for result in everyone) for i in range(len(live))]
    torch_median = next((m for m, (case, _) in zip(medians, live, strict=True) if case.backend == "torch"), None)
    return [
        Row(
            backend=case.backend,
            mode=case.mode,
            op="all_reduce",
            dtype=dtype,
            bytes=count * kind.itemsize,
            ranks=plane.world_size,
            device=case.communicator.key.device,
            graph=False,
            median_us=round(medians[i], 3),
            p99_us=round(p99s[i], 3),
            iterations=len(times[i]),
            vs_torch=None if torch_median is None else round(torch_median / medians[i], 2),
        )
        for i, (case, _) in enumerate(live)
    ]


def _calls_per_turn(case: Case, tensor: torch.Tensor, plane: Plane) -> int:
    """The uncounted first round, and from it the number of calls that fill a turn; the leader's estimate for all ranks."""
    estimate = statistics.median(_turn(case, tensor, _MIN_CALLS)) / 1e6
    calls = int(min(_MAX_CALLS, max(_MIN_CALLS, _TURN_S / max(estimate, 1e-7))))
    calls = int(plane.gather(calls, what="bench calibration")[0])
    _turn(case, tensor, max(1, calls // 2))
    return calls


def _turn(case: Case, tensor: torch.Tensor, calls: int) -> list[float]:
    """`calls` timed calls after a barrier, in microseconds each. On a GPU a call is timed until its result is there."""
    call: Callable[[torch.Tensor], object] = case.communicator.all_reduce_
    clock = time.perf_counter_ns
    if tensor.is_cuda:
        import torch

        launch, wait = call, torch.cuda.synchronize

        def call(tensor: torch.Tensor) -> None:
            launch(tensor)
            wait(tensor.device)

    stamps = [0] * (calls + 1)
    case.communicator.barrier()
    stamps[0] = clock()
    for i in range(1, calls + 1):
        call(tensor)
        stamps[i] = clock()
    return [(b - a) / 1000 for a, b in pairwise(stamps)]


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
