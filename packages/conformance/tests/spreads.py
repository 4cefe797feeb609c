"""What pytest-xdist does to the options of a run; it is not among what the tests need."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """As there: the long name of -n, and where the tests go."""
    parser.addoption("--numprocesses", type=int)
    parser.addoption("--dist", default="no")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A number of workers spreads the tests over them."""
    if config.option.numprocesses:
        config.option.dist = "load"
