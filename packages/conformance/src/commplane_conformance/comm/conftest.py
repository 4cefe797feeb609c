"""What the tests of communicator backends share: worlds of each size, and the cases that a backend declares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from commplane.testing import shm_leftovers
from commplane_conformance.plugin import SUBJECT
from commplane_conformance.subject import Subject
from commplane_conformance.worlds import World, Worlds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case for each size of a group, declared dtype and op that a test asks for."""
    subject = metafunc.config.stash.get(SUBJECT, None)
    if not isinstance(subject, Subject):
        return
    least = max((mark.args[0] for mark in metafunc.definition.iter_markers("at_least")), default=2)
    sizes = [n for n in subject.ranks if n >= least]
    names = metafunc.fixturenames
    if "dtype" in names and "op" in names:
        pairs = [(dtype, op) for dtype in subject.dtypes for op in subject.ops(dtype)]
        metafunc.parametrize(("dtype", "op"), pairs)
    elif "dtype" in names:
        metafunc.parametrize("dtype", subject.dtypes)
    elif "float_dtype" in names:
        metafunc.parametrize("float_dtype", [d for d in subject.dtypes if "float" in d])
    elif "op" in names:
        metafunc.parametrize("op", [op for op in ("sum", "min", "max", "avg") if op in subject.spec.ops])
    if "size" in names:
        # Without any case pytest would skip with a reason of its own, or fail: its ini files may say so.
        too_few = pytest.param(least, marks=pytest.mark.skip(reason=f"the test is for groups of {least} ranks or more"))
        metafunc.parametrize("size", sizes or [too_few], ids=lambda n: f"{n}-ranks", scope="session")


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> Subject:
    """The backend under test."""
    found = request.config.stash[SUBJECT]
    assert isinstance(found, Subject)  # else nothing in this folder is collected
    return found


@pytest.fixture(scope="session")
def worlds(subject: Subject) -> Iterator[Worlds]:
    """Processes as ranks, kept between tests."""
    out = Worlds(subject)
    yield out
    out.close()


@pytest.fixture
def world(worlds: Worlds, size: int) -> World:
    """The shared ranks, with a communicator over all of them. For tests that lose no rank."""
    return worlds.get(size)


@pytest.fixture(autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    """S36: no name outlives the communicator it was made for."""
    before = shm_leftovers()
    yield
    left = shm_leftovers() - before
    assert not left, f"left in /dev/shm: {sorted(left)}"
