"""What the options of `conftest.py` come to. They are unknown where pytest was started for more than this folder."""

from __future__ import annotations

import pytest

CASES = 500
"""By default: about a quarter of a minute of one core."""


def cases(config: pytest.Config) -> int:
    given = config.getoption("--cases", default=None)
    return int(given) if given is not None else CASES * (40 if config.getoption("--full", default=False) else 1)
