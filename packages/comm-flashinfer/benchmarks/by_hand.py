"""All-reduce + residual + RMSNorm: through commplane, by hand, unfused, and what the plan chooses; all take turns in one run.

commplane run --ranks 2 packages/comm-flashinfer/benchmarks/by_hand.py [--json FILE]            on two GPUs, in replayed graphs
commplane run --ranks 2 packages/comm-flashinfer/benchmarks/by_hand.py --device cpu --sizes 64K   how it works, without a GPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hand_calls import ByHand

import commplane
from commplane.api import QuantFormat, Quantization, add_rms_norm, quantize
from commplane.bench.graphs import Captured, capture
from commplane.bench.machine import describe, in_words
from commplane.bench.report import human_bytes
from commplane.bench.timing import Runner, agree_on_calls, take_turn
from commplane.errors import CommplaneError, CommplaneWarning
from commplane.runtime import Communicator, Plane

EPS = 1e-6
FUSED, QUANT = "all_reduce_rms_norm", "all_reduce_rms_norm_quant"
PAIRS = ("torch", "custom_ar", "torch_symm", "flashinfer")
POLICIES = {"policy": ["flashinfer", "custom_ar", "torch_symm", "torch"], "policy:flashinfer+torch": ["flashinfer", "torch"]}
FORMATS = ("fp8_static", "fp8_token", "fp8_group")


@dataclass(frozen=True)
class Row:
    """One candidate at one size: median over the counted calls of the slowest rank.

    Attributes:
        collective: what is done.
        format: of a quantised norm, else None.
        candidate: ``by_hand:ALGORITHM``, a backend's name for its fused call, ``pair:BACKEND``, or a policy.
        bytes: of a rank's tensor.
        median_us: microseconds a call.
        chosen: what the plan says that runs.
        ratio: `median_us` over that of what it is held against, or None.
        against: what that is: for ``flashinfer`` the faster call by hand, for a policy the fastest candidate.
    """

    collective: str
    format: str | None
    candidate: str
    bytes: int
    median_us: float
    chosen: str | None = None
    ratio: float | None = None
    against: str | None = None


@dataclass(frozen=True)
class Candidate:
    """What takes turns: its name as in `Row`, whose ranks begin together, one call, and what the plan says of it."""

    name: str
    communicator: Communicator
    call: Callable[[], object]
    chosen: str | None = None


class Bench:
    """Communicators and tensors of a run. Collective over all ranks, as are its methods."""

    def __init__(self, plane: Plane, stack: ExitStack, options: argparse.Namespace) -> None:
        self.plane, self.options, self.cuda = plane, options, options.device == "cuda"
        self.left_out: list[str] = []
        self.formed = {name: comm for name in PAIRS if (comm := self._form(stack, name, [name])) is not None}
        self.policies = {name: comm for name, wanted in POLICIES.items() if (comm := self._form(stack, name, wanted)) is not None}
        self.device = torch.device(next(iter(self.formed.values())).device)
        if self.cuda:
            torch.cuda.set_device(self.device)
        most = max(options.sizes)
        for comm in [*self.formed.values(), *self.policies.values()]:
            for collective in ("all_reduce", FUSED, QUANT):
                comm.prepare(collective, dtype=torch.bfloat16, max_bytes=most)
        self.hand: ByHand | None = None
        if "flashinfer" in self.formed and self.cuda:
            self.hand = ByHand(plane, self.device, most, options.hidden)
            stack.callback(self.hand.close)
        self._tune(most)

    def _form(self, stack: ExitStack, name: str, backends: list[str]) -> Communicator | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CommplaneWarning)  # what is not there is said below
            key = name.replace(":", "_").replace("+", "_")
            comm = self.plane.communicator(f"by_hand_{key}", device=self.options.device, backends=backends)
        if name in backends and comm.plan.backends[0] != name:
            reason = next((c.reason for c in comm.plan.candidates if c.name == name), "not installed")
            self.left_out.append(f"{name}: {reason}")
            comm.close()
            return None
        return stack.enter_context(comm)

    def _tune(self, most: int) -> None:
        """Let the plans measure what they choose from."""
        for name, comm in self.policies.items():
            tune = getattr(comm, "tune", None)
            if tune is None:
                self.left_out.append(f"{name}: not tuned, it is the order of preference")
                continue
            tune(FUSED, dtype=torch.bfloat16, max_bytes=most, hidden=self.options.hidden)

    def tensors(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Zeros, which stay zeros however often they are summed."""
        hidden = min(self.options.hidden, nbytes // 2)
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": self.device}
        x = torch.zeros(nbytes // 2 // hidden, hidden, **kind)
        return x, torch.zeros_like(x), torch.ones(hidden, **kind)

    def norms(self, nbytes: int) -> Iterator[Candidate]:
        """Every way to do `all_reduce_rms_norm`."""
        x, residual, weight = self.tensors(nbytes)
        for name, one_shot in self._by_hand(x):
            assert self.hand is not None
            yield Candidate(name, self.formed["flashinfer"], self.hand.norm(x, residual, weight, one_shot=one_shot))
        for name, comm in self._whole(FUSED, nbytes, "sum"):
            yield Candidate(
                name, comm, partial(comm.all_reduce_rms_norm, x, residual, weight, EPS), self._says(comm, FUSED, nbytes)
            )
        for name, comm in self.formed.items():

            def pair(comm: Communicator = comm) -> object:
                return add_rms_norm(comm.all_reduce(x), residual, weight, EPS)

            yield Candidate(f"pair:{name}", comm, pair, self._says(comm, "all_reduce", nbytes))

    def quantised(self, nbytes: int, kind: str) -> Iterator[Candidate]:
        """Every way to do `all_reduce_rms_norm_quant`."""
        x, residual, weight = self.tensors(nbytes)
        scale = torch.ones(1, device=self.device) if kind == "fp8_static" else None
        how = Quantization(QuantFormat(kind), scale)
        for name, one_shot in self._by_hand(x):
            assert self.hand is not None
            yield Candidate(name, self.formed["flashinfer"], self.hand.quantised(x, residual, weight, how, one_shot=one_shot))
        for name, comm in self._whole(QUANT, nbytes, kind):
            call = partial(comm.all_reduce_rms_norm_quant, x, residual, weight, how, EPS)
            yield Candidate(name, comm, call, self._says(comm, QUANT, nbytes, kind))
        for name, comm in self.formed.items():

            def parts(comm: Communicator = comm) -> object:
                norm, total = add_rms_norm(comm.all_reduce(x), residual, weight, EPS)
                return quantize(norm, how), total

            yield Candidate(f"pair:{name}", comm, parts)

    def _by_hand(self, x: torch.Tensor) -> Iterator[tuple[str, bool]]:
        if self.hand is not None:
            yield "by_hand:one_shot", True
            if x.shape[0] > self.plane.world_size:
                yield "by_hand:two_shot", False

    def _whole(self, collective: str, nbytes: int, op: str) -> Iterator[tuple[str, Communicator]]:
        """Backends that have it whole, then the policies."""
        for name, comm in self.formed.items():
            answer = comm.plan.explain(collective, nbytes=nbytes, dtype="bfloat16", op=op, graph=self.cuda)
            if answer.chosen == name:
                yield name, comm
        yield from self.policies.items()

    def _says(self, comm: Communicator, collective: str, nbytes: int, op: str = "sum") -> str:
        answer = comm.plan.explain(collective, nbytes=nbytes, dtype="bfloat16", op=op, graph=self.cuda)
        return f"{answer.chosen or 'composed'}{answer.algorithm and ':' + answer.algorithm}"

    def measure(self, candidates: Iterator[Candidate], collective: str, kind: str | None, nbytes: int) -> list[Row]:
        """Interleaved rounds; the first is not counted."""
        taking, runners = [], []
        for one in candidates:
            graph = capture(self.plane, one.communicator, one.call) if self.cuda else None
            if isinstance(graph, str):
                self.left_out.append(f"{one.name}, {kind or collective}, {human_bytes(nbytes)}: cannot be captured: {graph}")
                continue
            taking.append(one)
            runners.append(Runner(one.communicator, one.call, graph=graph if isinstance(graph, Captured) else None))
        calls = agree_on_calls(self.plane, runners)
        times: list[list[float]] = [[] for _ in runners]
        for number in range(self.options.rounds + 1):
            for i, runner in enumerate(runners):
                turn = take_turn(runner, calls[i])
                if number:
                    times[i].extend(turn)
        everyone = self.plane.gather([statistics.median(t) for t in times], what="by hand: times")
        slowest = [max(rank[i] for rank in everyone) for i in range(len(taking))]
        return compared(
            [Row(collective, kind, c.name, nbytes, round(us, 3), c.chosen) for c, us in zip(taking, slowest, strict=True)]
        )


def compared(rows: list[Row]) -> list[Row]:
    """The rows of one size with their ratios. Pure."""

    def against(row: Row, others: list[Row]) -> Row:
        best = min(others, key=lambda o: o.median_us)
        return Row(**asdict(row) | {"ratio": round(row.median_us / best.median_us, 3), "against": best.candidate})

    hand = [r for r in rows if r.candidate.startswith("by_hand:")]
    plain = [r for r in rows if r.candidate not in POLICIES]
    out = []
    for row in rows:
        # A policy is held against what it had to choose from, and FlashInfer by hand.
        mine = POLICIES.get(row.candidate, [])
        within = [r for r in plain if r in hand or r.candidate.removeprefix("pair:") in mine]
        others = within if mine else hand if row.candidate == "flashinfer" else []
        out.append(against(row, others) if others else row)
    return out


def table(rows: list[Row]) -> str:
    """One line a candidate and size."""
    lines = [f"{'what':<12}{'bytes':>10}  {'candidate':<26}{'us':>10}{'ratio':>8}  against / the plan says"]
    for r in rows:
        ratio = "" if r.ratio is None else f"{r.ratio:.3f}"
        notes = " / ".join(word for word in (r.against, r.chosen) if word)
        lines.append(
            f"{r.format or 'norm':<12}{human_bytes(r.bytes):>10}  {r.candidate:<26}{r.median_us:>10.2f}{ratio:>8}  {notes}"
        )
    return "\n".join(lines)


def sizes(text: str) -> list[int]:
    """Bytes from text such as 8K,1M. Pure."""
    units = {"K": 2**10, "M": 2**20}
    return sorted({int(word.rstrip("KM")) * units.get(word[-1], 1) for word in text.split(",")})


def main() -> int:
    """Each rank runs this; rank 0 prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=sizes, default=sizes("8K,64K,256K,1M,4M,8M,16M,32M"))
    parser.add_argument("--quant-sizes", type=sizes, default=sizes("64K,1M,8M"))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if min(options.sizes) < 2 * options.hidden or max(options.quant_sizes) > max(options.sizes):
        parser.error(f"sizes of {2 * options.hidden} bytes, one row, or more; quant-sizes up to the largest of them")
    with commplane.init() as plane, ExitStack() as stack:
        bench, rows = Bench(plane, stack, options), []
        for nbytes in options.sizes:
            rows += bench.measure(bench.norms(nbytes), FUSED, None, nbytes)
        for kind in FORMATS:
            for nbytes in options.quant_sizes:
                rows += bench.measure(bench.quantised(nbytes, kind), QUANT, kind, nbytes)
        machine = describe(plane, bench.formed.values(), ["run", "--ranks", str(plane.world_size), *sys.argv])
        if plane.rank == 0:
            print(table(rows), *(f"left out: {line}" for line in bench.left_out), f"on a {in_words(machine)}", sep="\n")
            if options.json:
                made = {"machine": machine | {"left_out": bench.left_out}, "rows": [asdict(r) for r in rows]}
                options.json.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommplaneError as error:
        sys.exit(str(error))
