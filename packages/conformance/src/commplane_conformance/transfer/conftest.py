"""What the tests of transfer engines share: ends as processes, anew for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from commplane_conformance.plugin import SUBJECT
from commplane_conformance.provider import EngineSubject
from commplane_conformance.transfer.ends import Ends


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> EngineSubject:
    """The engine under test."""
    found = request.config.stash[SUBJECT]
    assert isinstance(found, EngineSubject)  # else nothing in this folder is collected
    return found


@pytest.fixture(scope="session")
def all_ends(subject: EngineSubject) -> Iterator[Ends]:
    """Processes that ends are made in."""
    out = Ends(subject)
    yield out
    out.close()


@pytest.fixture
def ends(all_ends: Ends, request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Makes ends for one test."""
    failed = request.session.testsfailed
    yield all_ends
    all_ends.clear(keep=request.session.testsfailed == failed)
