"""``commplane-cache bench``: what the parts cost on this machine, each beside the plain way to do the same."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

__all__ = ["add_arguments", "run"]

_WHAT = {
    "rounds": "a sync round beside a plain all-reduce of the same numbers",
    "stores": "page stores beside bare pread and pwrite of the same pages",
    "tree": "match and insert of a prefix beside a plain tree of dicts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured; the rest is for the module that does it."""
    lines = "\n".join(f"  {name:<8} {text}" for name, text in _WHAT.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"what:\n{lines}\n\n'commplane-cache bench WHAT --help' has its options; all have --json FILE"
    parser.add_argument("what", choices=sorted(_WHAT))
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON that was asked for."""
    module = import_module(f"commplane_cache.bench.{arguments.what}")  # only this one: some load torch
    parser = argparse.ArgumentParser(prog=f"commplane-cache bench {arguments.what}", description=_WHAT[arguments.what])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    module.add_arguments(parser)
    chosen = parser.parse_args(arguments.rest)
    result = module.run(chosen)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    print(module.table(result) if hasattr(module, "table") else json.dumps(result, indent=1))
    return 0
