"""What the options of `conftest.py` come to. They are unknown where pytest was started for more than this folder."""

from __future__ import annotations

import pytest

CASES = 1000
"""By default: less than half a minute of one core."""


def cases(config: pytest.Config) -> int:
    given = config.getoption("--cases", default=None)
    return int(given) if given is not None else CASES * (20 if config.getoption("--full", default=False) else 1)
