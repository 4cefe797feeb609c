"""For the tests on GPUs: ranks that are kept between tests, which see FlashInfer's plugin and custom_ar's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpu_ranks import World, Worlds


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    out = Worlds("flashinfer", "custom_ar")
    yield out
    out.close()


@pytest.fixture
def world(worlds: Worlds, size: int) -> World:
    """The shared ranks. For tests that lose no rank."""
    return worlds.get(size)
