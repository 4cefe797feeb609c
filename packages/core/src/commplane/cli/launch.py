"""``commplane run``, and how the other commands get their ranks: a thin front of torchrun."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commplane.config import Config
from commplane.errors import ConfigError

__all__ = ["add_commands", "add_ranks_option", "in_ranks", "leave_outcome", "positive"]

# Not a setting, and so not named like one: where ranks started by a command leave their exit code.
_OUTCOMES = "_COMMPLANE_OUTCOMES"


def add_commands(commands: Any) -> None:
    """Define ``run``."""
    run = commands.add_parser("run", help="start a script on several ranks of this machine (through torchrun)")
    run.add_argument("--ranks", type=positive, default=2, metavar="N", help="number of ranks (default 2)")
    run.add_argument("-m", dest="module", action="store_true", help="the script is a module, as in python -m")
    run.add_argument("script", help="a Python file, or with -m a module")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    run.set_defaults(call=_run)


def _run(options: argparse.Namespace) -> int:
    """Become torchrun: signals reach it, and its exit code is ours."""
    command, environment = _torchrun(options.ranks, [*(["-m"] if options.module else []), options.script, *options.arguments])
    os.execve(command[0], command, environment)


def add_ranks_option(parser: argparse.ArgumentParser) -> None:
    """``--ranks``, for commands that start ranks when they are not one already."""
    parser.add_argument(
        "--ranks", type=positive, default=2, metavar="N", help="ranks to start on this machine (default 2; not under torchrun)"
    )


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, found {text}")
    return number


def in_ranks(options: argparse.Namespace) -> int | None:
    """None if this process is a rank already; otherwise start the same command on ``--ranks`` ranks: its exit code.

    Ranks started here leave their outcome in a folder and exit with 0: torchrun answers a failed rank by killing the others
    and printing its own traceback, which would bury the one line that says what is wrong.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return None
    Config.load()  # a wrong setting is said here, once, before any rank starts
    with tempfile.TemporaryDirectory() as folder:
        command, environment = _torchrun(options.ranks, ["-m", "commplane", *options.argv])
        code = _wait(subprocess.Popen(command, env={**environment, _OUTCOMES: folder}))
        outcomes = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    failed = [o for o in outcomes if o["error"]]
    if failed:
        print(f"commplane {options.command}: {failed[0]['error']}", file=sys.stderr)
    return code or max((int(o["code"]) for o in outcomes), default=1)


def leave_outcome(code: int, error: str) -> int:
    """In a rank that `in_ranks` started, leave the outcome there and return 0; elsewhere print the error: the exit code."""
    folder = os.environ.get(_OUTCOMES)
    if folder is None:
        if error:
            print(f"commplane: {error}", file=sys.stderr)
        return code
    path = Path(folder) / f"{int(os.environ['RANK']):06}.json"
    path.write_text(json.dumps({"code": code, "error": error}))
    return 0


def _torchrun(ranks: int, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment that run a Python script, or ``-m module``, on `ranks` ranks of this machine."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("starting ranks wants torch, which is not installed: pip install commplane[torch]")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # One thread a rank unless the user says otherwise: torchrun sets the same, with a warning.
    return [*command, *arguments], {"OMP_NUM_THREADS": "1", **os.environ}


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for torchrun, handing on the signals that ask this process to end, so that no rank is left behind."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    code = process.wait()
    return 128 - code if code < 0 else code
