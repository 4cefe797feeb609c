"""``commplane bench``: all eligible backends side by side in one run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from commplane.bench import measure, plot, require_plotting, table
from commplane.cli.launch import add_ranks_option, in_ranks, positive
from commplane.cli.parse import DTYPE_ALIASES, parse_size
from commplane.errors import ConfigError
from commplane.runtime import init

__all__ = ["add_commands"]

_SIZES = "64,1K,8K,64K,256K,1M,4M,16M"


def add_commands(commands: Any) -> None:
    """Define ``bench``."""
    parser = commands.add_parser("bench", help="latency of every usable backend, taking turns; table, JSON, plot")
    add_ranks_option(parser)
    parser.add_argument("--sizes", type=_sizes, default=_sizes(_SIZES), metavar="LIST", help=f"bytes (default {_SIZES})")
    parser.add_argument(
        "--dtypes", type=_dtypes, default=_dtypes("float32,bfloat16"), metavar="LIST", help="default float32,bfloat16"
    )
    parser.add_argument("--backends", metavar="LIST", help="which to compare with torch (default all that are usable)")
    parser.add_argument("--rounds", type=positive, default=7, help="counted rounds (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw latency against size (wants commplane[plot])")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.set_defaults(call=_bench)


def _sizes(text: str) -> list[int]:
    sizes = [parse_size(part) for part in text.split(",") if part.strip()]
    if not sizes:
        raise argparse.ArgumentTypeError("wanted at least one size, found none")
    return sizes


def _dtypes(text: str) -> list[str]:
    names = [DTYPE_ALIASES.get(part.strip(), part.strip()) for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError("wanted at least one dtype, found none")
    return names


def _bench(options: argparse.Namespace) -> int:
    for path in filter(None, (options.json, options.plot)):
        if not path.resolve().parent.is_dir():
            raise ConfigError(f"bench: the folder of {str(path)!r} does not exist")
    if options.plot is not None:
        require_plotting()
    code = in_ranks(options)
    if code is not None:
        return code
    import torch

    unknown = [d for d in options.dtypes if not isinstance(getattr(torch, d, None), torch.dtype)]
    if unknown:
        raise ConfigError(f"bench: torch has no dtype {', '.join(unknown)}")
    with init() as plane:
        speaks = plane.rank == 0

        def progress(text: str) -> None:
            if speaks and not options.quiet:
                end = "\r" if sys.stderr.isatty() else "\n"
                print(f"{text:<40}", end=end, file=sys.stderr, flush=True)

        names = None if options.backends is None else [n.strip() for n in options.backends.split(",") if n.strip()]
        rows = measure(
            plane, sizes=options.sizes, dtypes=options.dtypes, backends=names, rounds=options.rounds, progress=progress
        )
        if speaks:
            print(table(rows))
            if options.json is not None:
                options.json.write_text(json.dumps([r.to_json() for r in rows], indent=1) + "\n")
            if options.plot is not None:
                plot(rows, options.plot)
    return 0
