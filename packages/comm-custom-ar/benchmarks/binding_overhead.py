# SPDX-License-Identifier: Apache-2.0
"""What one call of the native library costs from Python, by binding: the figures of docs/adr/0001-native-binding.md.

python packages/comm-custom-ar/benchmarks/binding_overhead.py [--rounds N] [--json]

All calls take six integers and run on one core in turns, so that a slow moment of the machine meets all of them. Two native
functions are called: ``abs`` of the C library, which does next to nothing, and the all-reduce with a null handle, which writes
an error text and returns. The difference between the two is the native function's own time, not the binding's.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from commplane_custom_ar import _native

__all__ = ["ARGUMENTS", "Candidate", "candidates", "measure", "table"]

ARGUMENTS = (0, 0, 0, 0, 1, 1)
"""Null handle, null pointers, no elements, float32, sum."""

CALLS_PER_TURN = 2000


@dataclass(frozen=True)
class Candidate:
    """One way to call. `before` runs ahead of each turn, outside of the timing."""

    call: Callable[..., object]
    before: Callable[[], object] = lambda: None


def _python_function(handle: int, source: int, target: int, count: int, dtype: int, op: int) -> int:
    return 0


def candidates() -> dict[str, Candidate]:
    """What is compared, by name. Without the extension module in this build, its rows are missing."""
    nothing = ctypes.CDLL(None).abs
    nothing.restype = ctypes.c_int
    through_ctypes = _native.load("ctypes")
    nothing.argtypes = through_ctypes.library.commplane_car_all_reduce.argtypes
    out = {
        "Python function": Candidate(_python_function),
        "ctypes, empty function": Candidate(nothing),
        "ctypes, null handle": Candidate(through_ctypes.all_reduce),
    }
    try:
        abi3 = _native.load("abi3")
    except _native.NativeLibraryError:
        return out
    # The module calls whatever address it was told last, so each turn tells it.
    bind = abi3.all_reduce.__self__.bind  # type: ignore[attr-defined]
    empty = ctypes.cast(nothing, ctypes.c_void_p).value
    real, barrier = (
        ctypes.cast(getattr(abi3.library, f"commplane_car_{name}"), ctypes.c_void_p).value for name in ("all_reduce", "barrier")
    )
    out["abi3, empty function"] = Candidate(abi3.all_reduce, lambda: bind(empty, barrier))
    out["abi3, null handle"] = Candidate(abi3.all_reduce, lambda: bind(real, barrier))
    return out


def measure(calls: Mapping[str, Candidate], rounds: int) -> dict[str, list[float]]:
    """Nanoseconds a call of each candidate in each round, less the empty loop of that round. The first round is not counted."""
    clock, (a, b, c, d, e, f) = time.perf_counter_ns, ARGUMENTS
    out: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        begin = clock()
        for _ in itertools.repeat(None, CALLS_PER_TURN):
            pass
        loop = clock() - begin
        for name, candidate in calls.items():
            candidate.before()
            call = candidate.call
            begin = clock()
            for _ in itertools.repeat(None, CALLS_PER_TURN):
                call(a, b, c, d, e, f)
            spent = clock() - begin - loop
            if number:
                out[name].append(spent / CALLS_PER_TURN)
    return out


def table(times: Mapping[str, list[float]]) -> str:
    """Median and quartiles, and the median as a multiple of the Python function's."""
    scale = statistics.median(times["Python function"])
    lines = ["| call with six integers | ns, median | quartiles | times a Python call |", "|---|---|---|---|"]
    for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        low, middle, high = statistics.quantiles(values, n=4)
        lines.append(f"| {name} | {middle:.0f} | {low:.0f} to {high:.0f} | {middle / scale:.1f} |")
    return "\n".join(lines)


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description="cost of one native call from Python, by binding")
    parser.add_argument("--rounds", type=int, default=500, help="counted rounds (default 500)")
    parser.add_argument("--json", action="store_true", help="print all rounds as JSON")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: wanted 2 or more")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    times = measure(candidates(), options.rounds)
    where = f"Python {platform.python_version()}, {platform.machine()}, {options.rounds} rounds of {CALLS_PER_TURN} calls"
    sys.stdout.write(json.dumps({"where": where, "ns": times}) if options.json else f"{where}\n\n{table(times)}")
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
