"""``python -m commplane_cache.simulator``: play ranks of a cache, and say whether they stayed equal."""

from __future__ import annotations

import argparse
import gc
import sys
import time

from commplane.errors import CommplaneError
from commplane.testing import SimulatedRounds
from commplane_cache.simulator import MISTAKES, Scenario, simulate


def main() -> int:
    """0 if all ranks stayed equal to the end, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m commplane_cache.simulator", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="default 1000")
    parser.add_argument("--ranks", type=int, default=64, help="default 64")
    parser.add_argument("--seed", type=int, default=0, help="decides the policies, too; default 0")
    parser.add_argument("--mistake", choices=sorted(MISTAKES), help="let every rank decide something alone, and see it found")
    given = parser.parse_args()
    gc.freeze()
    gc.set_threshold(100_000)  # a step makes no cycles, and looking for them takes a quarter of the time
    began = last = time.monotonic()

    def told(step: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            sys.stderr.write(f"\r{step} of {given.steps} steps, {last - began:.0f} s")
            sys.stderr.flush()

    scenario = Scenario(ranks=given.ranks, steps=given.steps, seed=given.seed, mistake=MISTAKES.get(given.mistake))
    sys.stdout.write(f"{given.ranks} ranks, {given.steps} steps, seed {given.seed}: {scenario.cache_options()}\n")
    try:
        outcome = simulate(scenario, SimulatedRounds, told)
    except CommplaneError as error:
        sys.stdout.write(f"\n{error}\n")
        return 1
    took, busy = time.monotonic() - began, time.process_time()
    sys.stdout.write(
        f"\nequal on all ranks after every step, digest {outcome.digest:#x}; {outcome.served} requests, "
        f"{outcome.reused} pages reused, {outcome.computed} computed; {took:.1f} s, of which {busy:.1f} s on the processor: "
        f"{1e6 * busy / given.ranks / max(1, given.steps):.1f} us a rank and step\n"
    )
    for name, value in outcome.counters.items():
        sys.stdout.write(f"  {name}: {value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
