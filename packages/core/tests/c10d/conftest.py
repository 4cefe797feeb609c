"""The world that most tests here share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from c10d_world import World


@pytest.fixture(scope="session", autouse=True)
def c10d_flight_records_lie_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Faults are tested here: their records are not to push those of real jobs out of the default folder."""
    before = os.environ.get("COMMPLANE_FLIGHT_DIR")
    os.environ["COMMPLANE_FLIGHT_DIR"] = str(tmp_path_factory.mktemp("c10d-flight"))
    yield
    if before is None:
        del os.environ["COMMPLANE_FLIGHT_DIR"]
    else:
        os.environ["COMMPLANE_FLIGHT_DIR"] = before


@pytest.fixture(scope="session")
def _worlds() -> Iterator[list[World]]:
    """One that is used again and again; another one after a test that broke it."""
    kept: list[World] = []
    yield kept
    for world in kept:
        world.close()


@pytest.fixture(scope="session")
def four() -> Iterator[World]:
    """Four ranks, for tests that leave their default group as it was."""
    with World(4) as world:
        yield world


@pytest.fixture
def pair(_worlds: list[World]) -> World:
    """Two ranks, whose default group is commplane's."""
    if _worlds and _worlds[0].broken:
        _worlds.pop().close()
    if not _worlds:
        _worlds.append(World(2))
    return _worlds[0]
