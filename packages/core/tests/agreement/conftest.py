"""How many cases are tried."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=None, help="scenarios on virtual ranks; on processes 12 for every 500 of them")
    parser.addoption("--full", action="store_true", help="forty times as many scenarios as by default")
