"""The data plane: the ways to reduce in two levels, in place in a contiguous tensor of one dimension.

::

    leaders   all_reduce inside each host; the hosts' first ranks meet; they broadcast inside
    shards    all_reduce inside each host; each rank meets its counterparts for a part; each broadcasts its part inside

Both send as little between hosts as there can be, where a flat ring over the ranks of two hosts of k sends 2 - 1/k times as much.
Shards use as many connections between two hosts as one has ranks.
Between two hosts what is small is told in turns, the first host first, and each combines the two in that order, which takes half
as many steps as the transport's own all-reduce. All else goes by that. Calls allocate nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from commplane.api import Collective, InnerGroup, ReduceOp
from commplane.backends.hierarchical.losses import BetweenHosts
from commplane.backends.hierarchical.shape import Shape
from commplane.errors import ConfigError, PeerError

__all__ = ["Way", "bound", "chosen"]

Way = Callable[[Tensor], object]
"""Reduces its argument in place."""

TURNS_BELOW = 256 << 10
"""Bytes below which two hosts tell each other in turns: beyond, both directions at once are faster than fewer steps."""

_COMBINE: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}


def chosen(shape: Shape, algorithm: str) -> str:
    """The way that the setting `algorithm` stands for. Pure.

    Leaders are ``auto``: faster at every size where two ranks share a core, see docs/several-hosts.md. Shards are for a link that
    one connection does not use up.

    Raises:
        ConfigError: there is no such way, or not for hosts with unequal numbers of ranks.
    """
    possible = ("leaders", "shards") if shape.even else ("leaders",)
    if algorithm not in ("auto", *possible):
        wanted = ", ".join(("auto", *possible))
        raise ConfigError(f"setting hierarchical.algorithm: wanted {wanted} for this group, found {algorithm!r}")
    return "leaders" if algorithm == "auto" else algorithm


def bound(
    shape: Shape,
    algorithm: str,
    inside: InnerGroup | None,
    between: InnerGroup | None,
    op: ReduceOp,
    dtype: torch.dtype,
    ranks: int,
) -> Way:
    """The way, for messages of every size. Local; what is returned is collective over the group.

    Args:
        shape: of the group.
        algorithm: as `chosen` gave it.
        inside: this host's ranks; None where it has one.
        between: those that this rank meets between the hosts; None where it meets none.
        op: reduction.
        dtype: of the tensors.
        ranks: number of ranks of the group.
    """
    first = ReduceOp.SUM if op is ReduceOp.AVG else op

    def call(group: InnerGroup, collective: Collective, in_place: bool = False) -> Callable[..., Any]:
        return group.bind(collective, first if collective.reduces else None, dtype, in_place=in_place)

    meet = None if between is None else _meeting(call, between, first, dtype, ranks if op is ReduceOp.AVG else 1)
    if inside is None:
        assert meet is not None  # the only rank of a host meets the others
        way = meet
    else:
        reduce, spread = call(inside, Collective.ALL_REDUCE, True), call(inside, Collective.BROADCAST)
        way = (_leaders if algorithm == "leaders" else _shards)(shape, reduce, meet, spread)
    return way


def _meeting(call: Callable[..., Any], between: InnerGroup, op: ReduceOp, dtype: torch.dtype, divisor: int) -> Way:
    """What each host has as one, and that divided for a mean."""
    all_reduce_, tell = call(between, Collective.ALL_REDUCE, True), call(between, Collective.BROADCAST)
    limit = TURNS_BELOW if len(between.ranks) == 2 else 0
    received, first, combine = torch.empty(limit // dtype.itemsize, dtype=dtype), between.rank == 0, _COMBINE[op]

    def meet(part: Tensor) -> None:
        try:
            if part.nbytes >= limit:
                all_reduce_(part)
            else:
                other = received[: part.numel()]
                one, two = (part, other) if first else (other, part)
                tell(one, 0)
                tell(two, 1)
                combine(one, two, out=part)
        except PeerError as error:
            raise BetweenHosts(str(error), error.missing_ranks) from error
        if divisor > 1:
            part.div_(divisor)

    return meet


def _leaders(shape: Shape, reduce: Way, meet: Way | None, spread: Callable[[Tensor, int], object]) -> Way:
    first = meet if shape.place == 0 else None

    def leaders(flat: Tensor) -> None:
        reduce(flat)
        if first is not None:
            first(flat)
        spread(flat, 0)

    return leaders


def _shards(shape: Shape, reduce: Way, meet: Way | None, spread: Callable[[Tensor, int], object]) -> Way:
    assert meet is not None  # each has counterparts
    count, place, counterparts = len(shape.mine), shape.place, meet

    def shards(flat: Tensor) -> None:
        reduce(flat)
        parts = flat.tensor_split(count)
        if parts[place].numel():
            counterparts(parts[place])
        for owner, part in enumerate(parts):
            if part.numel():
                spread(part, owner)

    return shards
