"""From torch's call to a process group: the plane it stands on, and torch's own backends beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import commplane
from commplane.c10d.ground import Ground
from commplane.c10d.group import CommplaneGroup
from commplane.errors import CommunicatorError, PeerError
from commplane.runtime import Communicator

__all__ = ["communicator_behind", "create_group", "make_group", "ours"]

_ROUNDING = 0.1
"""Seconds by which a store may end its wait too early."""


def create_group(options: Any, backend_options: Any = None) -> CommplaneGroup:
    """What torch's `_DistributedBackendOptions` ask for. Collective over the group."""
    ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
    name = str(options.group_id)
    return make_group(options.store, ranks, options.group_rank, name, options.timeout, backend_options)


def make_group(
    store: Any, ranks: Sequence[int], rank: int, name: str, timeout: timedelta, backend_options: Any = None
) -> CommplaneGroup:
    """A process group. Collective over `ranks`.

    Args:
        store: for this group alone.
        ranks: global ranks in group order.
        rank: group rank of this process.
        name: torch's name of the group, the same on all of its ranks.
        timeout: of the group: how long its ranks wait for each other, here and in each collective.
        backend_options: those of NCCL, or None.
    """
    store = _meet(dist.PrefixStore("commplane", store), ranks, rank, name, timeout)
    ground = _ground(store, ranks, rank)
    try:
        return CommplaneGroup(ground, store, ranks, rank, name, timeout, backend_options)
    except BaseException:
        ground.release(wait=False)
        raise


def _meet(store: Any, ranks: Sequence[int], rank: int, name: str, timeout: timedelta) -> Any:
    """Return when all ranks are here: one may come minutes after another, which is the group's timeout to allow. Collective.

    A few messages a rank, however many there are. The result is the store of this group, in which nobody has written: a store
    outlives a group of the same name.
    """
    who = f"[c10d {name} rank {rank}/{len(ranks)}]"
    generations, store = store, dist.PrefixStore(str(store.add("generation", 0)), store)
    if store.add(f"here/{rank}", 1) == 1 and store.add("here", 1) == len(ranks):
        generations.add("generation", 1)  # whoever comes from now on makes another group
        store.set("everyone", "")
    deadline = time.monotonic() + timeout.total_seconds()
    try:
        store.wait(["everyone"], timeout)
    except RuntimeError as error:  # torch's DistStoreError, and DistNetworkError
        if time.monotonic() < deadline - _ROUNDING:
            raise PeerError(f"{who} the store does not answer: {error}") from error
        missing = [ranks[r] for r in range(len(ranks)) if not store.check([f"here/{r}"])]
        if not missing:  # the last one came just now
            return store
        raise PeerError(
            f"{who} creation: ranks {', '.join(map(str, missing))} did not come "
            f"within {timeout.total_seconds():g} s: call it on all ranks, or give it a longer timeout",
            missing,
        ) from error
    return store


def _ground(store: Any, ranks: Sequence[int], rank: int) -> Ground:
    """The plane of the default group if that is ours, which knows all global ranks; else one over `ranks` alone. Collective."""
    default = dist.group.WORLD
    if isinstance(default, CommplaneGroup):
        return default.ground.share()
    plane = commplane.init(store=dist.PrefixStore("plane", store), rank=rank, world_size=len(ranks))
    return Ground(plane, None if tuple(ranks) == tuple(range(len(ranks))) else tuple(ranks))


def ours(group: dist.ProcessGroup | None) -> CommplaneGroup:
    """`group`, or the default one, if it is of this backend. Local."""
    found = dist.group.WORLD if group is None else group
    if not isinstance(found, CommplaneGroup):
        raise CommunicatorError(f"wanted a process group of the backend commplane, found {found!r}")
    return found


def communicator_behind(group: dist.ProcessGroup | None, device: str) -> Communicator:
    """See `commplane.c10d.communicator_of`."""
    return ours(group).side(torch.device(device)).communicator
