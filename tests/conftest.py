"""What the cross-package tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from commplane.testing import shm_leftovers

Commplane = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def shared_memory_is_left_as_it_was() -> Iterator[None]:
    """No test leaves a name behind."""
    before = shm_leftovers()
    yield
    left = shm_leftovers() - before
    assert not left, f"left in /dev/shm: {left}"


@pytest.fixture
def commplane(tmp_path: Path) -> Commplane:
    """Run the command in an empty folder."""

    def run(*arguments: str, env: Mapping[str, str] | None = None, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "commplane", *arguments],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
