"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from dists import Wheels
from hypothesis import settings

# A slow machine is not a failure: examples have no deadline.
settings.register_profile("commplane", deadline=None)
settings.load_profile("commplane")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wheels]:
    """Distributions of the test's own."""
    made = Wheels(tmp_path, monkeypatch)
    yield made
    made.forget()
