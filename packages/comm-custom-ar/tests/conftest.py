"""For all tests of this folder: nothing is left in shared memory, and flight records of faults stay in a folder of the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from car_forks import Server

from commplane.testing import shm_leftovers


@pytest.fixture(autouse=True)
def shared_memory_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path / "flight"))
    before = shm_leftovers()
    yield
    assert shm_leftovers() <= before


@pytest.fixture(scope="session")
def forks() -> Iterator[Server]:
    """Where ranks are forked from."""
    server = Server()
    yield server
    server.close()
