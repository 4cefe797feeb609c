"""``python -m commplane_disagg.cli``."""

from __future__ import annotations

import sys

from commplane_disagg.cli import main

if __name__ == "__main__":
    sys.exit(main())
