"""The folder that a demo works in, and takes away at its end; one that was killed leaves it to the next demo."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commplane.api.shm import is_abandoned, owned_name

__all__ = ["scratch"]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, whose name says whose it is. Those of demos that have ended are removed first. Local."""
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.iterdir():
        if is_abandoned(folder):
            shutil.rmtree(folder)
    mine = parent / owned_name("cachedemo")
    mine.mkdir()
    try:
        yield mine
    finally:
        shutil.rmtree(mine)
