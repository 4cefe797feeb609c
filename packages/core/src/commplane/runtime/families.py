"""The communicators of a layout, made in one order on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from commplane.api import ParallelLayout
from commplane.errors import ConfigError, MismatchError
from commplane.runtime.communicator import Communicator
from commplane.select import difference

__all__ = ["Families", "form_families"]

Families = dict[str, Communicator]
"""The communicator of this rank's group by family, in the order of creation."""


def form_families(
    layout: ParallelLayout,
    rank: int,
    world_size: int,
    families: Sequence[str] | None,
    prefix: str,
    gather: Callable[[Any], Sequence[Any]],
    communicator: Callable[[str, Sequence[int]], Communicator],
) -> Families:
    """Compare what the ranks want, then form. Collective over all ranks of the plane.

    No rank waits for one that waits for it: all ranks go through the groups in the layout's one order, and leave out those that
    they are not in.

    Args:
        layout: which ranks form which groups.
        rank: global rank of this process.
        world_size: of the plane.
        families: names, or other words for them; None for all whose groups have more than one rank.
        prefix: put before the name of a family to name its communicator.
        gather: every rank's JSON value, by rank.
        communicator: forms one: name, global ranks.
    """
    problem: ConfigError | None = None
    chosen: set[str] = set()
    try:
        chosen = _chosen(layout, world_size, families)
    except ConfigError as error:  # perhaps on this rank only: the others are told before it is raised
        problem = error
    wanted = {
        "problem": problem and str(problem),
        "layout": repr(layout),
        "families": [f for f in layout.families if f in chosen],
        "prefix": prefix,
    }
    said = gather(wanted)
    if problem is not None:
        raise problem
    text = difference("the groups of a layout", dict(enumerate(said)))
    if text is not None:
        raise MismatchError(f"[{prefix or 'layout'} rank {rank}/{world_size}] {text}")
    made: Families = {}
    try:
        for family, ranks in layout.creation_order():
            if family in chosen and rank in ranks:
                made[family] = communicator(prefix + family, ranks)
    except BaseException:
        for c in made.values():
            c.abort()
            c._close(wait=False)
        raise
    return made


def _chosen(layout: ParallelLayout, world_size: int, families: Sequence[str] | None) -> set[str]:
    if layout.world_size != world_size:
        raise ConfigError(f"layout of {layout.world_size} ranks: wanted one of the plane's {world_size}")
    if families is None:
        return {f for f in layout.families if len(layout.groups(f)[0]) > 1}
    return {layout.family(name) for name in families}
