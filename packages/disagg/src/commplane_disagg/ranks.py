"""Which prefill rank writes what to which decode rank. Pure functions of two grids and the shape of the KV cache.

Both sides compute the same answer from the same four values, so nobody is asked. A rank of a grid is numbered
``(pp * grid.cp + cp) * grid.tp + tp``. What a rank holds:

========  =====================================================================================================
layers    those of its pipeline stage
heads     ``mha``: KV heads in equal runs over tp; with more tp ranks than heads, each head on ``tp / heads`` ranks.
          ``mla``: the latent, one head, on every tp rank
pages     all of them, or with ``cp_pages="dealt"`` the positions p of a request with ``p % cp == its cp rank``
========  =====================================================================================================

Where several prefill ranks hold the same bytes one of them sends, and the receivers are spread over the holders. A prefill rank
that sends to nobody is a dummy: one decode rank still tells it of the room, so that its state moves with that of its group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from commplane.errors import ConfigError

__all__ = ["Grid", "Holding", "Kv", "Piece", "holding", "notified_by", "notifies", "receives", "sends"]


_LIMIT = 1 << 16
"""Ranks of a grid, and layers and heads of a model: what a peer says of itself must not make this end count for ever."""


@dataclass(frozen=True)
class Kv:
    """What a model's KV cache is made of, whatever rank holds it.

    Attributes:
        layers: of the whole model.
        heads: KV heads of the whole model; 1 for ``"mla"``.
        kind: ``"mha"`` (also grouped-query) or ``"mla"``; the words of the registry's `Topology.attention`.
    """

    layers: int
    heads: int
    kind: str = "mha"

    def __post_init__(self) -> None:
        if self.kind not in ("mha", "mla"):
            raise ConfigError(f"kv: kind must be mha or mla, found {self.kind!r}")
        if not (1 <= self.layers <= _LIMIT and 1 <= self.heads <= _LIMIT):
            raise ConfigError(f"kv: layers and heads must be from 1 to {_LIMIT}, found {self.layers} and {self.heads}")
        if self.kind == "mla" and self.heads != 1:
            raise ConfigError(f"kv: mla has one latent, so heads must be 1, found {self.heads}")


@dataclass(frozen=True)
class Grid:
    """The ranks of one replica: attention tensor parallel x attention context parallel x pipeline.

    Attributes:
        tp: ranks that share the heads.
        cp: ranks that share a sequence.
        pp: pipeline stages.
        cp_pages: ``"all"``: every cp rank holds all pages (as prefill, cp rank 0 sends); ``"dealt"``: page p of a request is on
            cp rank ``p % cp`` alone.
        stages: layers of each pipeline stage; empty: equal ones.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    cp_pages: str = "all"
    stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if min(self.tp, self.cp, self.pp) < 1 or self.size > _LIMIT:
            raise ConfigError(
                f"grid: tp, cp and pp must be at least 1 and give at most {_LIMIT} ranks, found {self.tp}, {self.cp}, {self.pp}"
            )
        if self.cp_pages not in ("all", "dealt"):
            raise ConfigError(f"grid: cp_pages must be all or dealt, found {self.cp_pages!r}")
        if self.stages and (len(self.stages) != self.pp or min(self.stages) < 1):
            raise ConfigError(f"grid: stages must give the layers of each of {self.pp} pipeline stages, found {self.stages}")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.cp * self.pp

    def rank(self, *, tp: int = 0, cp: int = 0, pp: int = 0) -> int:
        """The number of the rank at these coordinates."""
        return (pp * self.cp + cp) * self.tp + tp

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """``(pp, cp, tp)`` of a rank.

        Raises:
            ConfigError: there is no such rank.
        """
        if not 0 <= rank < self.size:
            raise ConfigError(f"grid: tp {self.tp} x cp {self.cp} x pp {self.pp} has ranks 0 to {self.size - 1}, found {rank}")
        rest, tp = divmod(rank, self.tp)
        pp, cp = divmod(rest, self.cp)
        return pp, cp, tp


@dataclass(frozen=True)
class Holding:
    """What one rank holds: half-open ranges of layers and heads, and the positions ``p % every == phase`` of a request."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    every: int = 1
    phase: int = 0


@dataclass(frozen=True)
class Piece:
    """What one prefill rank writes to one decode rank, of every room.

    Attributes:
        sender: rank in the prefill grid.
        receiver: rank in the decode grid.
        layers: first and one past the last, numbered in the model.
        heads: first and one past the last KV head, numbered in the model.
        every: with `phase`: the positions p of a request's pages with ``p % every == phase``.
    """

    sender: int
    receiver: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    every: int = 1
    phase: int = 0

    def has(self, position: int) -> bool:
        """Whether the page at this position of a request belongs to the piece."""
        return position % self.every == self.phase


def holding(kv: Kv, grid: Grid, rank: int) -> Holding:
    """What a rank of a grid holds.

    Raises:
        ConfigError: the layers or heads do not divide over the grid; the text has the numbers.
    """
    pp, cp, tp = grid.coordinates(rank)
    every, phase = (grid.cp, cp) if grid.cp_pages == "dealt" else (1, 0)
    return Holding(_layers(kv, grid, pp), _heads(kv, grid.tp, tp), every, phase)


def receives(kv: Kv, prefill: Grid, decode: Grid, receiver: int) -> tuple[Piece, ...]:
    """The pieces that make up everything a decode rank holds, by sender.

    Raises:
        ConfigError: the two grids cannot serve each other, with the numbers.
    """
    return _receives(kv, prefill, decode, receiver)


def sends(kv: Kv, prefill: Grid, decode: Grid, sender: int) -> tuple[Piece, ...]:
    """The pieces that a prefill rank writes, by receiver; empty for a dummy. Raises what `receives` raises."""
    return _sends(kv, prefill, decode).get(_checked(prefill, sender), ())


def notifies(kv: Kv, prefill: Grid, decode: Grid, receiver: int) -> tuple[int, ...]:
    """The prefill ranks that a decode rank tells of each room: those that send to it, and its share of the dummies.

    Raises:
        ConfigError: the two grids cannot serve each other, with the numbers.
    """
    _checked(decode, receiver)
    return tuple(s for s in range(prefill.size) if receiver in notified_by(kv, prefill, decode, s))


def notified_by(kv: Kv, prefill: Grid, decode: Grid, sender: int) -> tuple[int, ...]:
    """The decode ranks that tell a prefill rank of each room: at least one. It waits for each, and for its acknowledgement.

    Raises:
        ConfigError: the two grids cannot serve each other, with the numbers.
    """
    pieces = sends(kv, prefill, decode, sender)
    return tuple(sorted({p.receiver for p in pieces})) or (sender % decode.size,)


def _checked(grid: Grid, rank: int) -> int:
    grid.coordinates(rank)
    return rank


def _layers(kv: Kv, grid: Grid, pp: int) -> tuple[int, int]:
    if grid.stages:
        if sum(grid.stages) != kv.layers:
            raise ConfigError(f"rank map: stages {grid.stages} have {sum(grid.stages)} layers, the model has {kv.layers}")
        first = sum(grid.stages[:pp])
        return first, first + grid.stages[pp]
    if kv.layers % grid.pp:
        raise ConfigError(
            f"rank map: {kv.layers} layers do not divide over pp {grid.pp}; say with stages= how many layers each stage has"
        )
    each = kv.layers // grid.pp
    return pp * each, (pp + 1) * each


def _heads(kv: Kv, size: int, tp: int) -> tuple[int, int]:
    if kv.kind == "mla":
        return 0, 1
    if kv.heads % size == 0:
        each = kv.heads // size
        return tp * each, (tp + 1) * each
    if size % kv.heads == 0:
        head = tp * kv.heads // size
        return head, head + 1
    raise ConfigError(
        f"rank map: {kv.heads} kv heads do not divide over tp {size}, nor tp {size} over {kv.heads} heads; "
        "use a tp that is a divisor or a multiple of the heads"
    )


def _copies(kv: Kv, size: int) -> int:
    """On how many tp ranks each head is."""
    return size if kv.kind == "mla" else max(1, size // kv.heads)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int] | None:
    first, last = max(a[0], b[0]), min(a[1], b[1])
    return (first, last) if first < last else None


@lru_cache(maxsize=4096)
def _receives(kv: Kv, prefill: Grid, decode: Grid, receiver: int) -> tuple[Piece, ...]:
    want = holding(kv, decode, receiver)
    _, cp, tp = decode.coordinates(receiver)
    here, there = _copies(kv, decode.tp), _copies(kv, prefill.tp)
    # The holders of one head are neighbours in tp. Receivers of the same bytes are spread over the holders: those of one cp rank
    # in order, so that equal grids go straight across; those of other cp ranks begin at another holder.
    mine = (tp % here) * there // here
    if decode.cp_pages == "all":
        mine = (mine + cp) % there
    pieces = []
    for pp in range(prefill.pp):
        layers = _overlap(_layers(kv, prefill, pp), want.layers)
        if layers is None:
            continue
        for sender_tp in range(mine, prefill.tp, there):
            heads = _overlap(_heads(kv, prefill.tp, sender_tp), want.heads)
            if heads is None:
                continue
            for sender_cp in range(prefill.cp if prefill.cp_pages == "dealt" else 1):
                positions = _meet((prefill.cp, sender_cp) if prefill.cp_pages == "dealt" else (1, 0), (want.every, want.phase))
                if positions is not None:
                    sender = prefill.rank(tp=sender_tp, cp=sender_cp, pp=pp)
                    pieces.append(Piece(sender, receiver, layers, heads, *positions))
    return tuple(sorted(pieces, key=lambda p: p.sender))


def _meet(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int] | None:
    """The positions that two (every, phase) share, as one; None if there are none."""
    every = math.lcm(a[0], b[0])
    return next(((every, p) for p in range(a[1], every, a[0]) if p % b[0] == b[1]), None)


@lru_cache(maxsize=256)
def _sends(kv: Kv, prefill: Grid, decode: Grid) -> dict[int, tuple[Piece, ...]]:
    table: dict[int, list[Piece]] = {}
    for receiver in range(decode.size):
        for piece in _receives(kv, prefill, decode, receiver):
            table.setdefault(piece.sender, []).append(piece)
    for rank in range(prefill.size):
        holding(kv, prefill, rank)  # a grid that does not divide is refused for all of its ranks, not only for those that send
    return {sender: tuple(pieces) for sender, pieces in table.items()}
