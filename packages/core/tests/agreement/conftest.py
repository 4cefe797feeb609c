"""How many cases are tried."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=None, help="scenarios on virtual ranks; on processes a hundredth of it")
    parser.addoption("--full", action="store_true", help="twenty times as many scenarios as by default")
