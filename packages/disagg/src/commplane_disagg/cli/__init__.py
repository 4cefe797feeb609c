"""The command ``commplane-disagg``. Each subcommand is a module beside this one, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from commplane.errors import CommplaneError

__all__ = ["main"]

_COMMANDS: dict[str, str] = {
    "serve": "run the bootstrap registry in the foreground",
    "bench": "measure transfer engines, or the registry",
    "demo": "prefill on two nodes, decode on a third, and the tokens of one process",
}
"""Name -> one line of help. Module `NAME` here defines ``add_arguments(parser)`` and ``run(arguments) -> int``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand: its exit code; 2 for wrong usage, 1 for an error that it explains."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="commplane-disagg", description="serve, demo, bench")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name in words[:1]:
            importlib.import_module(f"{__name__}.{name}").add_arguments(sub)
    arguments = parser.parse_args(words)
    try:
        return int(importlib.import_module(f"{__name__}.{arguments.command}").run(arguments))
    except CommplaneError as error:
        print(f"commplane-disagg {arguments.command}: {error}", file=sys.stderr)
        return 1
