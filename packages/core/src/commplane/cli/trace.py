"""``commplane trace``: the flight records of all ranks side by side; who is missing where; a trace for Perfetto."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from commplane.config import Config
from commplane.errors import CommplaneError
from commplane.flight import Folder, read_job, report

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Define ``trace``."""
    parser = commands.add_parser("trace", help="merge the flight records of a job: who is missing where; a Perfetto trace")
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="DIR", help="where the dumps of all ranks are (default: where they go here)"
    )
    parser.add_argument("--job", metavar="ID", help="which job (default: the one that dumped last)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the trace (default DIR/trace-ID.json)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(call=_trace)


def _trace(options: argparse.Namespace) -> int:
    folder: Path = options.folder or Folder(Config.load().flight_dir).path
    dumps, skipped = read_job(folder, options.job)
    for s in skipped:
        print(f"skipped {s.file}: {s.why}", file=sys.stderr)
    found = report(dumps, skipped)
    output: Path = options.output or folder / f"trace-{found.job}.json"
    try:
        output.write_text(json.dumps(found.trace()), encoding="utf-8")
    except OSError as error:
        raise CommplaneError(
            f"the trace cannot be written to {str(output)!r}: {error.strerror}: name another file with --output"
        ) from error
    if options.json:
        print(json.dumps({**found.to_json(), "trace": str(output)}, indent=2))
    else:
        print(found)
        print(f"trace: {output}, for https://ui.perfetto.dev")
    return 3 if found.findings else 0
