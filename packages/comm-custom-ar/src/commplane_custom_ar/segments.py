"""Shared-memory segments of a group: named for as long as it takes every rank to map them, and not a moment longer."""

from __future__ import annotations

from commplane.api import Bootstrap, owned_name, sweep
from commplane_custom_ar._native import Segment

__all__ = ["map_together"]


def map_together(bootstrap: Bootstrap, what: str, nbytes: int, own_offset: int, own_nbytes: int) -> Segment:
    """Create one segment of `nbytes` and map it on every rank. Collective.

    The leader creates it; each rank reserves ``[own_offset, own_offset + own_nbytes)``, so that its pages lie on its own NUMA
    node and a full ``/dev/shm`` is an error here, not a SIGBUS at the first write. The name is removed as soon as all ranks
    have mapped it, or anything fails, by every rank: it may be the only one left.

    Raises:
        OSError: this rank could not create, map or reserve.
    """
    name = ""
    try:
        if bootstrap.rank == 0:
            # The name is known before the file exists, so there is no moment at which a file could be left unnamed here.
            name = f"/{owned_name('car')}"
            Segment.create(name, nbytes)
        name = bootstrap.broadcast(name, what=f"{what}: name of the segment")
        segment = Segment.map(name, nbytes, own_offset, own_nbytes)
        try:
            bootstrap.barrier(what=f"{what}: all ranks have mapped")
        except BaseException:
            segment.close()
            raise
        Segment.unlink(name)  # by every rank: any of them may be killed here
        return segment
    except BaseException:
        if name:
            Segment.unlink(name)
        sweep()  # the leader may have been killed before anybody knew the name
        raise
