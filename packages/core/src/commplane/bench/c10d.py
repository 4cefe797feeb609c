"""What a call of torch.distributed costs over commplane: beside the communicator's own call, and beside torch's backend.

All calls take turns in one run, on one tensor, in place.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from commplane.bench.affinity import core_of
from commplane.bench.overhead import Spread
from commplane.bench.report import human_bytes
from commplane.bench.timing import Runner, agree_on_calls, take_turn
from commplane.runtime import Communicator, Plane

__all__ = ["C10D_CALLS", "C10dRow", "c10d_table", "measure_c10d"]

C10D_CALLS = {
    "communicator": "communicator.all_reduce_(x)",
    "all_reduce": "dist.all_reduce(x)",
    "async": "dist.all_reduce(x, async_op=True).wait()",
    "functional": "wait_tensor(all_reduce(x, 'sum', group))",
    "torch": "dist.all_reduce(x) over {torch}",
    "torch functional": "the functional one over {torch}",
}
"""What is called, by its name in a row, as people read it."""


@dataclass(frozen=True)
class C10dRow:
    """One call at one size.

    Attributes:
        call: a key of `C10D_CALLS`.
        pinned: whether each rank's threads were on one core.
        dtype: torch's name.
        bytes: of a rank's tensor.
        ranks: of the group.
        device: ``cpu`` or ``cuda``.
        torch_backend: what ``torch`` stands for, ``gloo`` or ``nccl``.
        backends: the plan of the communicator, in order.
        time: nanoseconds of a call; in a round, the median over its calls, of the slowest rank.
        over_communicator: how much more than ``communicator`` in the same round.
        of_torch: how many times as fast as the better of ``torch`` pinned and not, by medians; for functional calls, the
            functional one.
    """

    call: str
    pinned: bool
    dtype: str
    bytes: int
    ranks: int
    device: str
    torch_backend: str
    backends: tuple[str, ...]
    time: Spread
    over_communicator: Spread
    of_torch: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names."""
        return asdict(self)


def measure_c10d(
    plane: Plane,
    communicator: Communicator,
    reference: Any,
    *,
    sizes: Sequence[int],
    dtypes: Sequence[str],
    pin: Sequence[bool],
    rounds: int,
    progress: Callable[[str], None] = lambda _text: None,
) -> list[C10dRow]:
    """Time all calls at each size. Collective over all ranks; every rank returns the same rows.

    Args:
        plane: of the default group, which is commplane's and whose ranks take part.
        communicator: the one behind the default group.
        reference: a group of torch's own backend over the same ranks.
        sizes: bytes of a rank's tensor.
        dtypes: torch's names.
        pin: whether to measure pinned, not pinned, or one after the other.
        rounds: counted rounds; one before them is not counted.
        progress: told what is being measured.
    """
    core = core_of(plane.facts, plane.rank)
    rows: list[C10dRow] = []
    for dtype in dtypes:
        kind: torch.dtype = getattr(torch, dtype)
        for nbytes in sizes:
            progress(f"{dtype} {human_bytes(nbytes)}")
            tensor = torch.zeros(max(1, nbytes // kind.itemsize), dtype=kind, device=communicator.device)
            calls = _calls(communicator, reference, tensor)
            runners = {(name, on): Runner(communicator, call, core if on else None) for on in pin for name, call in calls.items()}
            counts = agree_on_calls(plane, list(runners.values()))
            mine = []
            for number in range(rounds + 1):
                turns = [statistics.median(take_turn(r, n)) * 1000 for r, n in zip(runners.values(), counts, strict=True)]
                mine += [turns] if number else []
            everyone = plane.gather(mine, what="bench c10d results")
            times = {key: [max(rank[n][i] for rank in everyone) for n in range(rounds)] for i, key in enumerate(runners)}
            rows += _rows(times, communicator, reference, dtype, tensor.nbytes)
    return rows


def _calls(communicator: Communicator, reference: Any, tensor: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    default: Any = dist.group.WORLD

    def later() -> None:
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        work.wait()

    wait: Callable[[torch.Tensor], torch.Tensor] = funcol.wait_tensor
    return {
        "communicator": lambda: communicator.all_reduce_(tensor),
        "all_reduce": lambda: dist.all_reduce(tensor),
        "async": later,
        "functional": lambda: wait(funcol.all_reduce(tensor, "sum", default)),
        "torch": lambda: dist.all_reduce(tensor, group=reference),
        "torch functional": lambda: wait(funcol.all_reduce(tensor, "sum", reference)),
    }


def _rows(
    times: dict[tuple[str, bool], list[float]], communicator: Communicator, reference: Any, dtype: str, nbytes: int
) -> list[C10dRow]:
    """One row for each call, pinned or not. Pure."""
    spreads = {key: Spread.of(values) for key, values in times.items()}

    def better(call: str) -> float:
        return min(spread.median_ns for (name, _), spread in spreads.items() if name == call)

    return [
        C10dRow(
            call=call,
            pinned=on,
            dtype=dtype,
            bytes=nbytes,
            ranks=communicator.world_size,
            device=communicator.key.device,
            torch_backend=str(dist.get_backend(reference)),
            backends=tuple(communicator.plan.backends),
            time=spread,
            over_communicator=Spread.of([t - o for t, o in zip(times[call, on], times["communicator", on], strict=True)]),
            of_torch=round(better("torch functional" if "functional" in call else "torch") / spread.median_ns, 2),
        )
        for (call, on), spread in spreads.items()
    ]


def c10d_table(rows: Sequence[C10dRow]) -> str:
    """Medians in microseconds; in brackets what that is more than the communicator's call, and how many times torch's speed."""
    subjects: dict[str, list[C10dRow]] = {}
    for r in rows:
        where = f"{r.dtype}, {r.ranks} ranks, {r.device}, {'pinned' if r.pinned else 'not pinned'}"
        subjects.setdefault(f"all_reduce sum in place, {where}", []).append(r)
    return "\n\n".join(_table(subject, group) for subject, group in subjects.items())


def _table(subject: str, rows: Sequence[C10dRow]) -> str:
    sizes = list(dict.fromkeys(r.bytes for r in rows))
    found = {(r.call, r.bytes): r for r in rows}
    lines = [["", *map(human_bytes, sizes)]]
    for call, text in C10D_CALLS.items():
        cells = [found[call, size] for size in sizes]
        lines.append([text.format(torch=rows[0].torch_backend), *map(_cell, cells)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    what = f"median us (more than the communicator's call; times {rows[0].torch_backend})"
    out = [f"{subject}; commplane runs on {'+'.join(rows[0].backends)}: {what}"]
    out += [
        (f"{line[0]:<{widths[0]}}" + "".join(f"{t:>{w + 2}}" for t, w in zip(line[1:], widths[1:], strict=True))).rstrip()
        for line in lines
    ]
    return "\n".join(out)


def _cell(row: C10dRow) -> str:
    text = f"{row.time.median_ns / 1000:.2f}"
    if row.call.startswith("torch"):
        return text
    more = "" if row.call == "communicator" else f"+{row.over_communicator.median_ns / 1000:.1f}, "
    return f"{text} ({more}{row.of_torch:.0f}x)" if row.of_torch >= 10 else f"{text} ({more}{row.of_torch:.1f}x)"
