"""What one call of an operator costs by the way it is registered: the figures behind `commplane/ops/library.py`.

python packages/core/benchmarks/op_dispatch.py [--rounds N]

Every kernel returns a tensor that is there already, so that dispatch alone is seen. All calls take a small CPU tensor that
requires no grad, two strings, and turns on one core. "Outside of autograd" is what `torch.inference_mode` leaves: the kernel at
CPU and none before it; the others can have a gradient. `commplane bench --overhead` measures the operators themselves.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKeySet, _AutoDispatchBelowAutograd

from commplane.ops.library import PLAIN

__all__ = ["candidates", "measure"]

CALLS_PER_TURN = 2000
SCHEMA = "reduce(Tensor x, str op, str group) -> Tensor"

Call = Callable[[torch.Tensor, str, str], Any]
_libraries: list[Any] = []


def _kernel(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    return _result


_result = torch.ones(16)


def _defined(namespace: str) -> tuple[Any, Any]:
    """A library with the operator and its kernel for CPU, and the operator."""
    library: Any = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)
    library.impl("reduce", _kernel, "CPU")
    _libraries.append(library)  # the operator goes when this does
    return library, getattr(torch.ops, namespace).reduce.default


def candidates() -> dict[str, Call]:
    """What is compared, by name."""

    def nothing(_x: torch.Tensor, _op: str, _group: str) -> torch.Tensor:
        return _result

    fallthrough, without = _defined("bench_without")
    fallthrough.impl("reduce", torch.library.fallthrough_kernel, "Autograd")

    registered, by_register = _defined("bench_register")
    torch.library.register_autograd("bench_register::reduce", lambda _ctx, g: (g, None, None), lib=registered)

    again, twice = _defined("bench_twice")

    def dispatch_again(x: torch.Tensor, op: str, group: str) -> Any:
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError
        with _AutoDispatchBelowAutograd():
            return twice(x, op, group)

    again.impl("reduce", dispatch_again, "Autograd")

    direct, ours = _defined("bench_ours")

    def call_directly(keys: DispatchKeySet, x: torch.Tensor, *rest: Any) -> Any:
        if (x.requires_grad and torch.is_grad_enabled()) or keys not in PLAIN:
            raise NotImplementedError
        return _kernel(x, *rest)

    direct.impl("reduce", call_directly, "Autograd", with_keyset=True)

    @torch.library.custom_op("bench_decorator::reduce", mutates_args=())
    def decorated(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
        return torch.empty_like(x)  # it must not return what it did not make

    decorated.register_autograd(lambda _ctx, g: (g, None, None))
    return {
        "Python function": nothing,
        "Library.impl, outside of autograd": without,
        "Library.impl, Autograd kernel that calls the kernel (ours)": ours,
        "Library.impl, Autograd kernel that dispatches again": twice,
        "Library.impl, register_autograd": by_register,
        "custom_op, register_autograd": decorated,
    }


def measure(rounds: int) -> dict[str, list[float]]:
    """Nanoseconds a call of each candidate in each round, less the empty loop of that round. The first round is not counted."""
    clock, x = time.perf_counter_ns, torch.ones(16)
    out: dict[str, list[float]] = {}
    calls = candidates()
    for number in range(rounds + 1):
        begin = clock()
        for _ in range(CALLS_PER_TURN):
            pass
        loop = clock() - begin
        for name, call in calls.items():
            begin = clock()
            for _ in range(CALLS_PER_TURN):
                call(x, "sum", "tp/2#1")
            spent = clock() - begin - loop
            if number:
                out.setdefault(name, []).append(spent / CALLS_PER_TURN)
    return out


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description="cost of one call of a PyTorch operator, by the way it is registered")
    parser.add_argument("--rounds", type=int, default=50, help="counted rounds (default 50)")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: wanted 2 or more")
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    lines = [
        f"torch {torch.__version__}, Python {platform.python_version()}, {options.rounds} rounds of {CALLS_PER_TURN} calls\n",
        "| operator | us, median | quartiles |",
        "|---|---|---|",
    ]
    for name, values in measure(options.rounds).items():
        low, middle, high = (v / 1000 for v in statistics.quantiles(values, n=4))
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
