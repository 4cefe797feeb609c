"""``commplane run``, and how the other commands get their ranks: a thin front of torchrun."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from commplane.errors import ConfigError

__all__ = ["add_commands", "add_ranks_option", "in_ranks", "torchrun"]


def add_commands(commands: Any) -> None:
    """Define ``run``."""
    run = commands.add_parser("run", help="start a script on several ranks of this machine (through torchrun)")
    run.add_argument("--ranks", type=_count, default=2, metavar="N", help="number of ranks (default 2)")
    run.add_argument("script", help="a Python file, or -m and a module")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    run.set_defaults(call=lambda options: torchrun(options.ranks, [options.script, *options.arguments]))


def add_ranks_option(parser: argparse.ArgumentParser) -> None:
    """``--ranks``, for commands that start ranks when they are not one already."""
    parser.add_argument(
        "--ranks", type=_count, default=2, metavar="N", help="ranks to start on this machine (default 2; not under torchrun)"
    )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, found {text}")
    return number


def in_ranks(options: argparse.Namespace) -> int | None:
    """None if this process is a rank already; otherwise start the same command on ``--ranks`` ranks: its exit code."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return None
    return torchrun(options.ranks, ["-m", "commplane", *options.argv])


def torchrun(ranks: int, arguments: Sequence[str]) -> int:
    """Run a Python script, or ``-m module``, on `ranks` ranks of this machine; the exit code of the first that failed."""
    try:
        import torch.distributed.run  # noqa: F401  only to say early and clearly that it is missing
    except ImportError as error:
        raise ConfigError(f"starting ranks wants torch, which does not import: {error}; pip install commplane[torch]") from error
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # One thread a rank unless the user says otherwise: torchrun sets the same, with a warning.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([*command, *arguments], env=environment, check=False).returncode
