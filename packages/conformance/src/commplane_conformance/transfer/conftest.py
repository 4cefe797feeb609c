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


@pytest.fixture
def ends(subject: EngineSubject) -> Iterator[Ends]:
    """Makes ends for the test, and kills those that it leaves."""
    out = Ends(subject)
    yield out
    out.close()
