"""The data plane: the ways to reduce in two levels, each from a contiguous tensor of one dimension to a new one.

::

    exchange   all_reduce inside; counterparts exchange all of it                     two steps, all bytes between
    shards     reduce_scatter inside; counterparts exchange a part; all_gather inside  each byte crosses once from a host
    leaders    all_reduce inside; the first ranks exchange all of it; broadcast inside for hosts with unequal numbers of ranks

"Exchange" is an all-gather whose rows each rank adds up itself in the order of hosts, which takes one step where an all-reduce
takes two, and as many bytes between two hosts. From three hosts up, large messages go by the transport's own all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from commplane.api import Collective, InnerGroup, ReduceOp, SizeRange
from commplane.backends.hierarchical.combine import combine
from commplane.backends.hierarchical.losses import BetweenHosts
from commplane.backends.hierarchical.shape import Shape
from commplane.errors import PeerError

__all__ = ["Way", "bound", "sizes"]

Way = Callable[[Tensor], Tensor]

SHARDS_FROM = 16384
"""Bytes of a message from which shards are faster than the exchange of all of it; measured, see docs/several-hosts.md."""

RING_FROM = 65536
"""Bytes that a rank exchanges from which, over three hosts and more, the transport's all-reduce is taken: less traffic."""


def sizes(shape: Shape) -> list[SizeRange]:
    """Which way has which sizes, of a message of a rank. Pure."""
    if not shape.even:
        return [SizeRange(0, None, "leaders")]
    return [SizeRange(0, SHARDS_FROM, "exchange"), SizeRange(SHARDS_FROM, None, "shards")]


def bound(
    shape: Shape, inside: InnerGroup | None, between: InnerGroup | None, op: ReduceOp, dtype: torch.dtype, ranks: int
) -> Way:
    """The way for every size. Local; what is returned is collective over the group.

    Args:
        shape: of the group.
        inside: this host's ranks; None where it has one.
        between: those that this rank meets between the hosts; None where it meets none.
        op: reduction.
        dtype: of the tensors.
        ranks: number of ranks of the group.
    """
    first = ReduceOp.SUM if op is ReduceOp.AVG else op

    def call(group: InnerGroup, collective: Collective, in_place: bool = False) -> Callable[..., Any]:
        return group.bind(collective, first if collective.reduces else None, dtype, in_place=in_place)

    across = None if between is None else _across(call, between, len(shape.hosts), op, ranks)
    if not shape.even:
        return _leaders(call, inside, across)
    assert inside is not None and across is not None
    exchange, shards = _exchange(call, inside, across), _shards(call, inside, across, len(shape.mine))
    return lambda flat: exchange(flat) if flat.nbytes < SHARDS_FROM else shards(flat)


def _across(call: Callable[..., Any], between: InnerGroup, hosts: int, op: ReduceOp, ranks: int) -> Way:
    """What each host has as one. The argument may be overwritten."""
    all_gather, all_reduce_ = call(between, Collective.ALL_GATHER), call(between, Collective.ALL_REDUCE, True)

    def across(mine: Tensor) -> Tensor:
        try:
            if hosts > 2 and mine.nbytes >= RING_FROM:
                all_reduce_(mine)
                return mine.div_(ranks) if op is ReduceOp.AVG else mine
            parts = all_gather(mine)
        except PeerError as error:
            raise BetweenHosts(str(error), error.missing_ranks) from error
        return combine(parts.view(hosts, -1), op, ranks)

    return across


def _exchange(call: Callable[..., Any], inside: InnerGroup, across: Way) -> Way:
    all_reduce = call(inside, Collective.ALL_REDUCE)
    return lambda flat: across(all_reduce(flat))


def _shards(call: Callable[..., Any], inside: InnerGroup, across: Way, count: int) -> Way:
    reduce_scatter, all_gather = call(inside, Collective.REDUCE_SCATTER), call(inside, Collective.ALL_GATHER)

    def shards(flat: Tensor) -> Tensor:
        n = flat.numel()
        if n % count:
            padded = flat.new_zeros(-(-n // count) * count)
            padded[:n] = flat
            flat = padded
        return all_gather(across(reduce_scatter(flat)))[:n]  # type: ignore[no-any-return]

    return shards


def _leaders(call: Callable[..., Any], inside: InnerGroup | None, across: Way | None) -> Way:
    if inside is None:
        assert across is not None
        alone = across
        return lambda flat: alone(flat.clone())
    all_reduce, broadcast = call(inside, Collective.ALL_REDUCE), call(inside, Collective.BROADCAST)

    def leaders(flat: Tensor) -> Tensor:
        mine: Tensor = all_reduce(flat)
        if across is not None:
            mine = across(mine)
        return broadcast(mine, 0)  # type: ignore[no-any-return]

    return leaders
