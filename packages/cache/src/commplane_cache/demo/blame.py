"""Who is to blame when several groups fall one after the other.

A rank that is lost is seen by its peers in one group; when they leave, their peers in other groups see them go, and would name
the wrong ones. So each rank leaves a note with whom it misses before it leaves, and one whose peer gave up reads why.
"""

from __future__ import annotations

import json
from typing import Any

from commplane.errors import PeerError

__all__ = ["traced"]


def traced(store: Any, rank: int, error: PeerError) -> PeerError:
    """The error to end with: it names the ranks at which all notes end. Local; waits for nobody.

    Args:
        store: a c10d store that all ranks share.
        rank: this one.
        error: what it met; its note is left here, so the groups must not have been left yet.
    """
    store.set(_key(rank), json.dumps(error.missing_ranks))
    seen, lost, open_ = {rank}, set[int](), list(error.missing_ranks)
    while open_:
        other = open_.pop()
        if other in seen:
            continue
        seen.add(other)
        if store.check([_key(other)]):
            open_ += json.loads(store.get(_key(other)))
        else:
            lost.add(other)
    if not lost or lost == set(error.missing_ranks):
        return error
    names = ", ".join(map(str, sorted(lost)))
    return PeerError(f"{error}; the first to be missing was rank {names}", sorted(lost))


def _key(rank: int) -> str:
    return f"missed by/{rank}"
