"""Whether an engine opens on this machine: ``python -m commplane_conformance.transfer.opens FACTORY OPTIONS``.

A process of its own: nothing that a native library starts or breaks there bears on the tests. Exit code 0, or 1 with the reason
as the last line of stderr.
"""

from __future__ import annotations

import json
import sys

from commplane.api import TransferContext
from commplane.errors import CommplaneError
from commplane_conformance.provider import load


def main(factory: str, options: str) -> int:
    """Open and close one: the exit code."""
    try:
        engine = load(factory)()
        engine.open(TransferContext("commplane-conformance", timeout=30.0, options=json.loads(options)))
        engine.close()
    except CommplaneError as error:
        print(error, file=sys.stderr)  # noqa: T201 - this is its answer
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
