"""``python -m commplane``."""

from __future__ import annotations

import sys

from commplane.cli import main

if __name__ == "__main__":
    sys.exit(main())
