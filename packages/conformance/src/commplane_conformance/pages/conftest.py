"""What the tests of page stores share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from commplane.api import PageStore
from commplane_conformance.pages.place import Place
from commplane_conformance.plugin import SUBJECT
from commplane_conformance.provider import StoreSubject


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest) -> StoreSubject:
    """The store under test."""
    found = request.config.stash[SUBJECT]
    assert isinstance(found, StoreSubject)  # else nothing in this folder is collected
    return found


@pytest.fixture
def place(subject: StoreSubject, tmp_path: Path) -> Iterator[Place]:
    """A fresh place for pages."""
    out = Place(subject, tmp_path)
    yield out
    out.close()


@pytest.fixture
def store(place: Place) -> PageStore:
    """An open store with nothing in it."""
    return place.open()
