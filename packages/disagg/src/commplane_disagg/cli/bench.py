"""``commplane-disagg bench engines|registry``: speeds, as a table or as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

__all__ = ["add_arguments", "run"]

_BENCHES = {
    "engines": "transfer engines beside memcpy, a plain socket, NIXL and Mooncake",
    "registry": "registration, the table, and the sync of ports",
}
"""Name -> one line of help. Module `NAME` of `commplane_disagg.bench` defines ``add_arguments(parser)`` and ``run(arguments)``,
which returns what JSON has, and ``table(found)``, lines for a reader."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and its options."""
    what = parser.add_subparsers(dest="bench", required=True, metavar="WHAT")
    for name, text in _BENCHES.items():
        sub = what.add_parser(name, help=text, description=text)
        importlib.import_module(f"commplane_disagg.bench.{name}").add_arguments(sub)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON that was asked for."""
    module = importlib.import_module(f"commplane_disagg.bench.{arguments.bench}")
    found = module.run(arguments)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(module.table(found)))
    return 0
