"""What a rank does in the soak: make a plane and a communicator, run random collectives and check each, close. It may be killed.

The ranks of one iteration draw from generators with the same seed, so they make the same calls.
"""

from __future__ import annotations

import mmap
import random
import signal
import time
import warnings
from typing import Any

import torch
from car_calls import raised
from car_oracle import DTYPES, FLOATS, ops_of, reduced, same_bits
from car_threads import host

import commplane
from commplane.errors import CommplaneError, PeerError
from commplane.runtime import Communicator, Plane

PHASES = ["fork", "init", "communicator", "empty", "prepare", "call", "close", "end"]
MOST_BYTES = 4 << 20
# An iteration in which nobody is killed in the calls ends all the same.
MOST_SECONDS = 60.0

Plan = dict[str, Any]


class WrongResult(Exception):
    """A collective gave something else than the oracle."""


class Life:
    """One rank of one iteration.

    Args:
        plan: what `soak.plan_of` drew.
        board: memory that the driver maps too; this rank writes its phase at its own place.
    """

    def __init__(self, rank: int, world_size: int, plan: Plan, board: mmap.mmap) -> None:
        self.rank = rank
        self.world_size = world_size
        self.plan = plan
        self.board = board
        self.calls = 0
        self.draw = random.Random(plan["seed"])
        self.ring = torch.arange(MOST_BYTES + 17, dtype=torch.int32) % 17 - 8

    def at(self, phase: str) -> None:
        """Tell the driver where this rank is."""
        self.board[self.rank] = PHASES.index(phase)

    def inputs(self, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """What each rank contributes to this call: small integers, another row each time."""
        return [self.ring[(s := (self.calls + 5 * r) % 17) : s + count].to(dtype) for r in range(self.world_size)]

    def random_call(self, tp: Communicator, buffer: torch.Tensor) -> None:
        """One collective of random kind, dtype, op, size and kind of memory; raises `WrongResult`."""
        draw, n = self.draw, self.world_size
        self.calls += 1
        kind = draw.choice(["all_reduce", "all_reduce_", "all_gather", "reduce_scatter", "broadcast", "norm", "norm_", "barrier"])
        dtype = draw.choice(FLOATS if kind in ("norm", "norm_") else DTYPES)
        op, src, symmetric = draw.choice(ops_of(dtype)), draw.randrange(n), draw.random() < 0.4
        nbytes = min(int(2 ** draw.uniform(0, 22.1)), MOST_BYTES) if draw.random() < 0.95 else 0
        count = nbytes // dtype.itemsize
        count -= count % n
        if kind == "barrier":
            tp.barrier()
            return
        parts = self.inputs(count, dtype)
        mine = parts[tp.rank]
        x = buffer.view(dtype)[:count].copy_(mine) if symmetric else mine.clone()
        if kind in ("norm", "norm_"):
            self.norm(tp, kind, x, parts)
            return
        if kind == "all_gather":
            got, wanted = tp.all_gather(x), torch.cat(parts)
        elif kind == "broadcast":
            got, wanted = tp.broadcast(x, src), parts[src]
        else:
            call = {"all_reduce": tp.all_reduce, "all_reduce_": tp.all_reduce_, "reduce_scatter": tp.reduce_scatter}[kind]
            got, wanted = call(x, op), reduced(parts, op)
            if kind == "reduce_scatter":
                wanted = wanted.chunk(n)[tp.rank] if count else wanted
        if not same_bits(got, wanted):
            raise WrongResult(f"call {self.calls}: {kind} {op} {dtype} {count} symmetric={symmetric} src={src}")

    def norm(self, tp: Communicator, kind: str, x: torch.Tensor, parts: list[torch.Tensor]) -> None:
        """The fused norm in rows of 1 to 64; the new residual is checked to the bit, and the norm of it roughly."""
        hidden = next(h for h in (64, 16, 4, 1) if x.numel() % h == 0)
        rows, weight = x.view(-1, hidden), torch.full((hidden,), 2.0, dtype=x.dtype)
        residual = torch.ones_like(rows).clone()
        call = tp.all_reduce_rms_norm if kind == "norm" else tp.all_reduce_rms_norm_
        norm, new = call(rows, residual, weight)
        wanted = (reduced(parts, "sum") + 1).view(-1, hidden)
        wide = new.double()
        about = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * 2
        near = torch.allclose(norm.double(), about, rtol=2e-2, atol=1e-3)
        if not same_bits(new, wanted) or not near:
            raise WrongResult(f"call {self.calls}: {kind} {x.dtype} {x.numel()} hidden={hidden}")

    def run(self, store: Any) -> dict[str, Any]:
        """Live, and say how it ended: as JSON."""
        said: dict[str, Any] = {"error": None, "again": None, "closed": False}
        plane: Plane | None = None
        tp: Communicator | None = None
        try:
            self.at("init")
            settings = self.plan["settings"]
            plane = commplane.init(store=store, rank=self.rank, world_size=self.world_size, plugins=host(), config=settings)
            self.at("communicator")
            tp = plane.communicator("tp", self.plan["order"])
            self.at("empty")
            buffer = tp.empty(MOST_BYTES, dtype=torch.uint8)
            began = time.monotonic()
            while self.calls < self.plan["calls"] and time.monotonic() - began < MOST_SECONDS:
                buffer = self.step(tp, buffer)
            self.at("close")
            plane.close()
            self.at("end")
            said["closed"] = True
        except CommplaneError as error:
            missing = list(error.missing_ranks) if isinstance(error, PeerError) else None
            said |= {"error": type(error).__name__, "missing": missing, "text": str(error)}
            said["phase"] = PHASES[self.board[self.rank]]
            if tp is not None:
                said["again"] = raised(tp.barrier)
            if plane is not None:
                plane.close()
            said["closed"] = True
        except WrongResult as wrong:
            said["wrong"] = str(wrong)
        return {**said, "calls": self.calls}

    def step(self, tp: Communicator, buffer: torch.Tensor) -> torch.Tensor:
        """A call, or now and then an allocation or larger staging. Ranks leave the loop only by `plan["calls"]` or an error."""
        what = self.draw.random()
        if what < 0.05:
            self.at("empty")
            return tp.empty(MOST_BYTES, dtype=torch.uint8)
        if what < 0.1:
            self.at("prepare")
            tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << self.draw.randrange(10, 23))
            return buffer
        self.at("call")
        self.random_call(tp, buffer)
        return buffer


def live(store: Any, rank: int, world_size: int, plan: Plan, board: mmap.mmap) -> dict[str, Any]:
    """A rank process."""
    warnings.simplefilter("ignore")  # a peer that is missing at close is a warning, and here it is meant to be
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    return Life(rank, world_size, plan, board).run(store)
