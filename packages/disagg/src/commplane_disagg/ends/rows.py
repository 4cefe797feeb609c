"""Between ends and the registry: the row that an end registers, and the replica that a table of rows describes."""

from __future__ import annotations

from collections.abc import Iterable

from commplane.errors import ConfigError
from commplane_disagg.ends.decode import Address, PrefillReplica
from commplane_disagg.ends.end import End
from commplane_disagg.ranks import Grid, Kv
from commplane_disagg.wire import Coordinate, EngineOffer, Row, Topology

__all__ = ["CP_PAGES", "STAGES", "grid_of", "kv_of", "replica_of", "row_of"]

CP_PAGES = "cp_pages"
"""Key of `Topology.extra`: `Grid.cp_pages`, where it is not ``"all"``."""

STAGES = "stages"
"""Key of `Topology.extra`: `Grid.stages`, as ``"6,6,4"``, where they are not equal."""

_END = "end"
"""Key of `Row.extra`: the name of the end."""


def kv_of(topology: Topology) -> Kv:
    """The cache of the model."""
    return Kv(topology.layers, topology.kv_heads, topology.attention)


def grid_of(topology: Topology) -> Grid:
    """One replica of the group: what is left without its data parallelism.

    Raises:
        ConfigError: what `extra` says of it cannot be read.
    """
    stages = topology.extra.get(STAGES, "")
    try:
        numbers = tuple(int(n) for n in stages.split(",")) if stages else ()
    except ValueError as error:
        raise ConfigError(f"topology: {STAGES} must read like 6,6,4, found {stages!r}") from error
    cp_pages = topology.extra.get(CP_PAGES, "all")
    return Grid(tp=topology.tp, cp=topology.cp, pp=topology.pp, cp_pages=cp_pages, stages=numbers)


def row_of(end: End, key: Coordinate, *, epoch: int = 0, host: str = "") -> Row:
    """The row under which an open end is registered.

    Args:
        end: of this process; its instance is the row's.
        key: its place in the group.
        epoch: how often this rank was restarted.
        host: that peers reach; by default the end's own.
    """
    engine = EngineOffer(end.card.engine, end.card.metadata)
    return Row(
        key=key,
        host=host or end.host,
        port=end.port,
        instance=end.identity.instance,
        epoch=epoch,
        engines=(engine,),
        extra={_END: end.name},
    )


def replica_of(topology: Topology, rows: Iterable[Row], dp: int = 0) -> PrefillReplica:
    """One data-parallel replica of a group, for `DecodeEnd.receive`.

    Raises:
        ConfigError: a rank of it has no row, or a row that no end made.
    """
    grid = grid_of(topology)
    ranks: dict[int, Address] = {}
    for row in rows:
        if row.key.dp != dp:
            continue
        if _END not in row.extra:
            raise ConfigError(f"registry: the row of {row.key} at {row.host} names no end; make it with row_of")
        rank = grid.rank(tp=row.key.tp, cp=row.key.cp, pp=row.key.pp)
        ranks[rank] = Address(row.extra[_END], row.host, row.port)
    return PrefillReplica(grid, ranks)
