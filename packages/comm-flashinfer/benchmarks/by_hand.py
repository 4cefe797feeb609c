"""All-reduce + residual + RMSNorm: through commplane, by hand, unfused, and what the plan chooses; all take turns in one run.

commplane run --ranks 2 packages/comm-flashinfer/benchmarks/by_hand.py [--json FILE]            on two GPUs, in replayed graphs
python tests/gpu/gpu_mps.py 2 commplane run --ranks 2 ... --sizes 8K,64K,256K,1M,4M,8M            on one GPU that both share
commplane run --ranks 2 packages/comm-flashinfer/benchmarks/by_hand.py --device cpu --sizes 64K   how it works, without a GPU

The JSON is written after every size, so that a run which is cut short leaves what it has. A kernel that waits for ever ends the
run after --limit seconds.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hand_calls import ByHand
from hand_rows import HAND, THROUGH, Row, compared, table, worst

import commplane
from commplane.api import QuantFormat, Quantization, add_rms_norm, quantize
from commplane.bench.graphs import capture
from commplane.bench.machine import describe, in_words
from commplane.bench.report import human_bytes
from commplane.bench.timing import Runner, agree_on_calls, take_turn
from commplane.cli.parse import parse_size
from commplane.errors import CommplaneError, CommplaneWarning, SelectionError
from commplane.runtime import Communicator, Plane

__all__ = ["arguments"]

EPS = 1e-6
FUSED, QUANT = "all_reduce_rms_norm", "all_reduce_rms_norm_quant"
BACKENDS = ("torch", "custom_ar", "torch_symm", THROUGH)
POLICIES = {"policy": [THROUGH, "custom_ar", "torch_symm", "torch"], "policy:flashinfer+torch": [THROUGH, "torch"]}


@dataclass(frozen=True)
class Candidate:
    """What takes turns: its name as in `Row`, whose calls it captures, one call, and what the plan says that runs."""

    name: str
    communicator: Communicator
    call: Callable[[], object]
    chosen: str | None = None


class Bench:
    """Communicators and tensors of a run. Collective over all ranks, as are its methods."""

    def __init__(self, plane: Plane, stack: ExitStack, options: argparse.Namespace) -> None:
        self.plane, self.options, self.cuda = plane, options, options.device == "cuda"
        self.most = max(*options.sizes, *options.quant_sizes)
        self.left_out: list[str] = []
        self.formed = {name: comm for name in BACKENDS if (comm := self._form(stack, name, [name])) is not None}
        self.policies = {name: comm for name, wanted in POLICIES.items() if (comm := self._form(stack, name, wanted)) is not None}
        # Ranks of one GPU have no NCCL, and FlashInfer has no barrier for a turn to begin with.
        beginning = self.formed.get("custom_ar") or self.formed.get("torch")
        if beginning is None:
            raise CommplaneError(f"wanted custom_ar or torch, which have a barrier, found neither: {'; '.join(self.left_out)}")
        self.beginning = beginning
        self.device = torch.device(beginning.device)
        if self.cuda:
            torch.cuda.set_device(self.device)
        for comm in [*self.formed.values(), *self.policies.values()]:
            for collective in ("all_reduce", FUSED, QUANT):
                comm.prepare(collective, dtype=torch.bfloat16, max_bytes=self.most)
        self.hand: ByHand | None = None
        if THROUGH in self.formed and self.cuda:
            self.hand = ByHand(plane, self.device, self.most, options.hidden)
            stack.callback(self.hand.close)
        for name, comm in self.policies.items():
            self._tune(name, comm)

    def _form(self, stack: ExitStack, name: str, backends: Sequence[str]) -> Communicator | None:
        """A communicator of those `backends` that are installed; of a single one None, and why, where it cannot serve."""
        backends = [b for b in backends if b in self.plane.plugins.backends()]
        key = name.replace(":", "_").replace("+", "_")
        # By default it serves messages of up to 8 MiB, and there is nothing to choose at more.
        room = {THROUGH: {"max_bytes": self.most, "max_workspace_bytes": 4 << 30}} if THROUGH in backends else None
        if not backends:
            self.left_out.append(f"{name}: not installed")
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CommplaneWarning)  # what is not there is said at the end
                comm = self.plane.communicator(f"by_hand_{key}", device=self.options.device, backends=backends, options=room)
        except SelectionError as error:  # on every rank alike
            self.left_out.append(f"{name}: {error}")
            return None
        if name in BACKENDS and comm.plan.backends[0] != name:
            reason = next(c.reason for c in comm.plan.candidates if c.name == name)
            self.left_out.append(f"{name}: {reason}")
            comm.close()
            return None
        return stack.enter_context(comm)

    def _tune(self, name: str, comm: Communicator) -> None:
        """Let the plan of a policy measure what it chooses from, at the sizes that are measured here."""
        tune = partial(comm.tune, dtype=torch.bfloat16, hidden=self.options.hidden)
        self._say(f"tunes {name}, norm")
        tune(FUSED, sizes=self.options.sizes)
        for kind in self.options.formats:
            self._say(f"tunes {name}, {kind}")
            tune(QUANT, sizes=self.options.quant_sizes, op=kind)

    def _say(self, text: str) -> None:
        """Progress. A step that takes longer than the limit ends this rank, with what it was doing, and so the run."""
        faulthandler.dump_traceback_later(self.options.limit, exit=True)
        if self.plane.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def tensors(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Zeros, which stay zeros however often they are summed."""
        hidden = self.options.hidden
        kind: dict[str, Any] = {"dtype": torch.bfloat16, "device": self.device}
        x = torch.zeros(nbytes // 2 // hidden, hidden, **kind)
        return x, torch.zeros_like(x), torch.ones(hidden, **kind)

    def norms(self, nbytes: int) -> Iterator[Candidate]:
        """Every way to do `all_reduce_rms_norm`."""
        x, residual, weight = self.tensors(nbytes)
        for name, one_shot in self._by_hand(x):
            assert self.hand is not None
            yield Candidate(name, self.formed[THROUGH], self.hand.norm(x, residual, weight, one_shot=one_shot))
        for name, comm, says in self._whole(FUSED, nbytes, "sum"):
            yield Candidate(name, comm, partial(comm.all_reduce_rms_norm, x, residual, weight, EPS), says)
        for name, comm in self._pairs(nbytes):

            def pair(comm: Communicator = comm) -> object:
                return add_rms_norm(comm.all_reduce(x), residual, weight, EPS)

            yield Candidate(f"pair:{name}", comm, pair)

    def quantised(self, nbytes: int, kind: str) -> Iterator[Candidate]:
        """Every way to do `all_reduce_rms_norm_quant`."""
        x, residual, weight = self.tensors(nbytes)
        scale = torch.ones(1, device=self.device) if kind == "fp8_static" else None
        how = Quantization(QuantFormat(kind), scale)
        for name, one_shot in self._by_hand(x):
            assert self.hand is not None
            yield Candidate(name, self.formed[THROUGH], self.hand.quantised(x, residual, weight, how, one_shot=one_shot))
        for name, comm, says in self._whole(QUANT, nbytes, kind):
            yield Candidate(name, comm, partial(comm.all_reduce_rms_norm_quant, x, residual, weight, how, EPS), says)
        for name, comm in self._pairs(nbytes):

            def parts(comm: Communicator = comm) -> object:
                norm, total = add_rms_norm(comm.all_reduce(x), residual, weight, EPS)
                return quantize(norm, how), total

            yield Candidate(f"pair:{name}", comm, parts)

    def _by_hand(self, x: torch.Tensor) -> Iterator[tuple[str, bool | None]]:
        if self.hand is not None:
            yield HAND, None
            if x.shape[0] > self.plane.world_size:
                yield f"{HAND}:two_shot", False

    def _whole(self, collective: str, nbytes: int, op: str) -> Iterator[tuple[str, Communicator, str]]:
        """Backends that have it whole, then the policies, with what each plan says that runs."""
        for name, comm in [*self.formed.items(), *self.policies.items()]:
            answer = comm.plan.explain(collective, nbytes=nbytes, dtype="bfloat16", op=op, graph=self.cuda)
            if name in self.policies or answer.chosen == name:
                yield name, comm, f"{answer.chosen}{answer.algorithm and ':' + answer.algorithm}"

    def _pairs(self, nbytes: int) -> Iterator[tuple[str, Communicator]]:
        """Backends that have the sum at this size; torch in their place would go by their name."""
        for name, comm in self.formed.items():
            answer = comm.plan.explain("all_reduce", nbytes=nbytes, dtype="bfloat16", graph=self.cuda)
            if answer.chosen == name:
                yield name, comm

    def measure(self, candidates: Iterator[Candidate], collective: str, kind: str | None, nbytes: int) -> list[Row]:
        """Interleaved rounds; the first is not counted."""
        what = f"{kind or 'norm'} of {human_bytes(nbytes)}"
        self._say(what)
        taking, runners = [], []
        for one in candidates:
            graph = capture(self.plane, one.communicator, one.call) if self.cuda else None
            if isinstance(graph, str):
                self.left_out.append(f"{one.name}, {what}: cannot be captured: {graph}")
                continue
            taking.append(one)
            runners.append(Runner(self.beginning, one.call, graph=graph))
        calls = agree_on_calls(self.plane, runners)
        times: list[list[float]] = [[] for _ in runners]
        for number in range(self.options.rounds + 1):
            for j in range(len(runners)):
                i = (number + j) % len(runners)  # so that none always follows the same one
                turn = take_turn(runners[i], calls[i])
                if number:
                    times[i].append(statistics.median(turn))
        everyone = self.plane.gather([statistics.median(t) for t in times], what="by hand: times")
        slowest = [max(rank[i] for rank in everyone) for i in range(len(taking))]
        faulthandler.cancel_dump_traceback_later()
        rows = [Row(collective, kind, c.name, nbytes, round(us, 3), c.chosen) for c, us in zip(taking, slowest, strict=True)]
        return compared(rows, POLICIES)


def run(plane: Plane, stack: ExitStack, options: argparse.Namespace) -> str:
    """All of it, and the table. Collective over all ranks; rank 0 writes the JSON after each size."""
    bench = Bench(plane, stack, options)
    machine = describe(plane, bench.formed.values(), ["run", "--ranks", str(plane.world_size), *sys.argv])
    machine |= {"left_out": bench.left_out}
    todo: list[tuple[str, str | None, int]] = [(FUSED, None, nbytes) for nbytes in options.sizes]
    todo += [(QUANT, kind, nbytes) for kind in options.formats for nbytes in options.quant_sizes]
    rows: list[Row] = []
    for collective, kind, nbytes in sorted(todo, key=lambda one: one[2]):  # what is cut short has all of the smaller sizes
        candidates = bench.norms(nbytes) if kind is None else bench.quantised(nbytes, kind)
        rows += bench.measure(candidates, collective, kind, nbytes)
        if plane.rank == 0 and options.json:
            made = {"machine": machine, "worst": worst(rows), "rows": [r.to_json() for r in rows]}
            options.json.write_text(json.dumps(made, indent=1) + "\n")
    return "\n".join([table(rows), *(f"left out: {line}" for line in bench.left_out), f"on a {in_words(machine)}"])


def sizes(text: str) -> list[int]:
    """Bytes from text such as 8K,1M. Pure."""
    return sorted({parse_size(word) for word in text.split(",")})


def formats(text: str) -> list[str]:
    """Of the quantised norm. Pure."""
    return [str(QuantFormat(word)) for word in text.split(",") if word]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a run, checked. Local."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=sizes, default=sizes("8K,64K,256K,1M,4M,8M,16M,32M"), help="of the norm")
    parser.add_argument("--quant-sizes", type=sizes, help="of the quantised norm (default the same)")
    parser.add_argument("--formats", type=formats, default=["fp8_static", "fp8_token"], help="fp8_static, fp8_token, fp8_group")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--limit", type=float, default=120.0, metavar="SECONDS", help="for one size, or for tuning one call")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(given)
    options.quant_sizes = options.quant_sizes or options.sizes
    if any(nbytes % (2 * options.hidden) for nbytes in (*options.sizes, *options.quant_sizes)):
        parser.error(f"wanted sizes of whole rows of {2 * options.hidden} bytes")
    if "nvfp4" in options.formats:
        parser.error("wanted formats of fp8: nvfp4 by hand is not written here")
    return options


def main() -> int:
    """Each rank runs this; rank 0 prints."""
    options = arguments()
    # No times of earlier runs: what a plan chooses is measured here, and each backend by itself is used at every size.
    with commplane.init(config={"tuning": "off"}) as plane, ExitStack() as stack:
        text = run(plane, stack, options)
        if plane.rank == 0:
            print(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommplaneError as error:
        sys.exit(str(error))
