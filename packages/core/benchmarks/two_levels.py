"""Where the time of an all-reduce in two levels goes: its steps on rank 0, beside Gloo flat and Gloo between two ranks alone.

As root, two hosts of two ranks: python -m commplane.testing.hosts -- packages/core/benchmarks/two_levels.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import commplane
from commplane.backends.hierarchical import ways

SIZES = (1 << 20, 4 << 20, 16 << 20, 64 << 20)
STEPS = ("inside", "between", "broadcast")


class Clock:
    """Milliseconds of each thing that was timed, by name."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose times are kept under `name`."""

        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.times.setdefault(name, []).append((time.perf_counter() - began) * 1000)

        return run

    def line(self, names: tuple[str, ...]) -> str:
        """The medians."""
        return "".join(f"{statistics.median(self.times[name]):>12.1f}" for name in names)


def watch(clock: Clock) -> None:
    """Time the steps of every communicator that is formed from now on."""
    leaders = ways._leaders

    def watched(shape: Any, reduce: Any, meet: Any, spread: Any) -> Any:
        inside, between, broadcast = STEPS
        meet = meet and clock.timed(between, meet)  # which the leaders alone have
        return leaders(shape, clock.timed(inside, reduce), meet, clock.timed(broadcast, spread))

    ways._leaders = watched


def say(line: str) -> None:
    """At once: the ranks share a pipe."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Each rank runs this; rank 0 says."""
    dist.init_process_group("gloo")
    clock, rank = Clock(), dist.get_rank()
    watch(clock)
    plane = commplane.init()
    tp = plane.communicator("tp", options={"hierarchical": {"algorithm": "leaders"}})
    firsts = [ranks[0] for ranks in plane.facts.hosts(list(plane.facts))]
    alone = dist.new_group(firsts)
    ways_to = {
        "gloo": lambda x: dist.all_reduce(x),
        "call": tp.all_reduce_,
        "two alone": lambda x: dist.all_reduce(x, group=alone) if rank in firsts else None,
    }
    names = ("gloo", "call", *STEPS, "two alone")
    if rank == 0:
        say("   median ms" + "".join(f"{name:>12}" for name in names))
    for size in SIZES:
        x = torch.ones(size // 4)
        tp.prepare("all_reduce", dtype=torch.float32, max_bytes=size)
        for number in range(21 if size < 16 << 20 else 11):
            if number == 1:  # the first one does not count
                clock.times.clear()
            for name, call in ways_to.items():
                tp.barrier()
                clock.timed(name, call)(x)
                x.fill_(1)
        if rank == 0:
            say(f"{size >> 20:>8} MiB" + clock.line(names))
    plane.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
