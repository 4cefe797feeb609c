"""The folder that a demo works in, and takes away at its end; one that was killed leaves it to the next demo."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commplane.api.shm import owned_name, owner

__all__ = ["scratch"]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, whose name says whose it is. Those of demos that have ended are removed first. Local."""
    parent.mkdir(parents=True, exist_ok=True)
    for folder in parent.iterdir():
        who = owner(folder.name)
        if who is not None and who.gone:
            shutil.rmtree(folder)
    mine = parent / owned_name("cachedemo")
    mine.mkdir()
    try:
        yield mine
    finally:
        shutil.rmtree(mine)
