"""The command ``commplane``.

Exit codes: 0 done, 1 it failed (the reason is on standard error), 2 wrong usage, 3 it ran and found a problem.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from commplane.cli import bench, doctor, launch, plugins, trace, tune
from commplane.errors import CommplaneError

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="commplane", description="Communication backends that every rank of a group agrees on.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (doctor, plugins, bench, tune, trace, launch):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    options.argv = arguments
    warnings.simplefilter("default")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        return launch.leave_outcome(int(options.call(options)), "")
    except CommplaneError as error:
        return launch.leave_outcome(1, str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone; nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
