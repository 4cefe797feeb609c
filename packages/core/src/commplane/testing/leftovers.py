"""Did a test leave anything in shared memory?"""

from __future__ import annotations

import os

from commplane.api.shm import SHM_DIRECTORY, owner

__all__ = ["shm_leftovers"]


def shm_leftovers() -> set[str]:
    """Names of commplane in shared memory that nobody is going to remove: their process has ended, or it is this one.

    Names of other living processes are their business; two test runs on one machine do not disturb each other.
    """
    if not SHM_DIRECTORY.is_dir():
        return set()
    found = {name: owner(name) for name in (path.name for path in SHM_DIRECTORY.iterdir())}
    return {name for name, who in found.items() if who is not None and (who.pid == os.getpid() or who.gone)}
