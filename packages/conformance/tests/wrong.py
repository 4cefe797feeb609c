"""Backends that are wrong in one thing each, by name, and the test of the kit that is meant to find it.

Every one of them passes the canary, or is wrong where the canary does not look.
"""

from __future__ import annotations

from typing import Any

import wrong_life
import wrong_values

CAUGHT_BY = wrong_values.CAUGHT_BY | wrong_life.CAUGHT_BY
"""Name of each wrong backend -> the test that is meant for it."""


def __getattr__(name: str) -> Any:
    return getattr(wrong_values if name in wrong_values.CAUGHT_BY else wrong_life, name)
