"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def flight_records_of_tests_lie_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Faults are what is tested here: their records are not to push those of real jobs out of the default folder."""
    before = os.environ.get("COMMPLANE_FLIGHT_DIR")
    os.environ["COMMPLANE_FLIGHT_DIR"] = str(tmp_path_factory.mktemp("flight"))
    yield
    if before is None:
        del os.environ["COMMPLANE_FLIGHT_DIR"]
    else:
        os.environ["COMMPLANE_FLIGHT_DIR"] = before
