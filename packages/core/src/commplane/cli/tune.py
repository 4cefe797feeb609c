"""``commplane tune``: verify, time, agree, persist."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from commplane.api import Collective, QuantFormat
from commplane.cli.launch import add_ranks_option, in_ranks
from commplane.cli.parse import DTYPE_ALIASES, parse_size
from commplane.errors import ConfigError
from commplane.runtime import Communicator, init
from commplane.runtime.follow import facts_of
from commplane.runtime.tuning import Tuning
from commplane.select import Timings

__all__ = ["add_commands"]

_TUNABLE = [c for c in Collective if c is Collective.ALL_REDUCE or c.norms]


def add_commands(commands: Any) -> None:
    """Define ``tune``."""
    tune = commands.add_parser("tune", help="measure every way to run a collective on a group of all ranks, and write the times")
    add_ranks_option(tune)
    tune.add_argument(
        "--collectives",
        type=_collectives,
        default=[Collective.ALL_REDUCE, Collective.ALL_REDUCE_RMS_NORM],
        metavar="LIST",
        help=f"of {', '.join(_TUNABLE)} (default all_reduce,all_reduce_rms_norm)",
    )
    tune.add_argument(
        "--op",
        choices=list(map(str, QuantFormat)),
        help=f"the format of {Collective.ALL_REDUCE_RMS_NORM_QUANT} (default {QuantFormat.FP8_STATIC})",
    )
    tune.add_argument("--dtypes", type=_dtypes, default=["bfloat16"], metavar="LIST", help="default bfloat16")
    tune.add_argument("--sizes", type=_sizes, metavar="LIST", help="bytes of a rank's tensor (default 8K to 32M, doubling)")
    tune.add_argument("--hidden", type=int, default=4096, metavar="N", help="last dimension for norms (default 4096)")
    tune.add_argument("--device", choices=["cpu", "cuda"], help="default as the setting device")
    tune.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="for each collective and dtype (default 60)")
    tune.add_argument(
        "--out", type=_out, metavar="FILE", help="where to write the times, for the setting tuning; without it nothing is kept"
    )
    tune.set_defaults(call=_tune)


def _items(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise argparse.ArgumentTypeError(f"wanted a list such as a,b, found {text!r}")
    return list(dict.fromkeys(items))


def _collectives(text: str) -> list[Collective]:
    for name in (names := _items(text)):
        if name not in _TUNABLE:
            raise argparse.ArgumentTypeError(f"wanted some of {', '.join(_TUNABLE)}, found {name!r}")
    return [Collective(name) for name in names]


def _dtypes(text: str) -> list[str]:
    return [DTYPE_ALIASES.get(name, name) for name in _items(text)]


def _sizes(text: str) -> list[int]:
    return [parse_size(item) for item in _items(text)]


def _out(text: str) -> str:
    # Before minutes of measuring, not after them.
    folder = Path(text).absolute().parent
    if Path(text).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"wanted a file in a folder that can be written to, found {text!r}")
    return text


def _tune(options: argparse.Namespace) -> int:
    if options.op is not None and Collective.ALL_REDUCE_RMS_NORM_QUANT not in options.collectives:
        wanted = f"wants {Collective.ALL_REDUCE_RMS_NORM_QUANT} among --collectives"
        raise ConfigError(f"--op {options.op} {wanted}, found {', '.join(options.collectives)}: leave --op out")
    code = in_ranks(options)
    if code is not None:
        return code
    with init() as plane, plane.communicator("tune", device=options.device) as comm:
        for collective in options.collectives:
            for dtype in options.dtypes:
                if plane.rank == 0:
                    print(f"tunes {collective} of {dtype}", file=sys.stderr, flush=True)
                op = options.op if collective is Collective.ALL_REDUCE_RMS_NORM_QUANT else None
                comm.tune(collective, dtype=dtype, sizes=options.sizes, hidden=options.hidden, op=op, budget_s=options.budget)
        assert comm.plan.timings is not None
        what = "tune, what timings depend on"
        found = facts_of(comm.plan, plane.facts, comm.device, plane.config.options, lambda mine: plane.gather(mine, what=what))
        if plane.rank == 0:
            print(_table(comm), flush=True)
            if options.out:
                # What has a source was followed and not measured here.
                Tuning(found[0], Timings(tuple(c for c in comm.plan.timings.curves if not c.source))).write(options.out)
        failed = any(c.failed for c in comm.plan.timings.curves)
    return 3 if failed else 0


def _table(comm: Communicator) -> str:
    assert comm.plan.timings is not None
    lines: list[str] = []
    for c in comm.plan.timings.curves:
        parts = [c.collective, c.variant, c.dtype, "graph" if c.graph else None, f"hidden {c.hidden}" if c.hidden else None]
        what = " ".join(part for part in parts if part)
        lines.extend(f"{what:<40} {n:>10} bytes {us:>10.1f} us  {c.candidate}" for n, us in c.points)
        if c.failed:
            lines.append(f"{what:<40} {c.candidate} failed: {c.failed}")
    return "\n".join([*lines, str(comm.plan)])
