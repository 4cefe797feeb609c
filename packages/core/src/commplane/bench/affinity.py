"""Which core a rank is put on for a pinned turn, and how.

Gloo's latency is the wake-up of one thread by another, so it moves by a factor of two with where its threads are allowed to run;
which way is better depends on the machine. So both are measured, and pinning is undone after each turn.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from commplane.api import Facts

__all__ = ["core_of", "pinned"]


def core_of(facts: Facts, rank: int) -> int:
    """The core for global rank `rank`: of its affinity mask, the one at its number among the ranks of its host. Local.

    With more ranks than cores several ranks get the same one.
    """
    neighbours = next(group for group in facts.hosts(list(facts)) if rank in group)
    cores = sorted(facts[rank].cores)
    return cores[neighbours.index(rank) % len(cores)]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep every thread of this process on `core` inside; afterwards each runs where it ran before. Local.

    Threads that begin meanwhile inherit the core, and get the caller's cores when it is over. One rank a process: ranks that are
    threads would move each other.

    Raises:
        OSError: this process may not run on `core`.
    """
    home = os.sched_getaffinity(0)
    before: dict[int, set[int]] = {}
    try:
        # Again until nobody is new: a thread that is not moved yet may start another one.
        while new := _threads() - before.keys():
            for thread in new:
                before[thread] = home
                with suppress(ProcessLookupError):  # it has ended since it was listed
                    before[thread] = os.sched_getaffinity(thread)
                    os.sched_setaffinity(thread, {core})
        yield
    finally:
        done: set[int] = set()
        while new := _threads() - done:
            for thread in new:
                with suppress(ProcessLookupError):
                    os.sched_setaffinity(thread, before.get(thread, home))
            done |= new


def _threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}
