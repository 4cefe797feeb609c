"""What travels between ranks and the registry: typed structs, as msgpack or JSON, never pickle.

A field that is added later has a default, so that an older end can still be understood; one that changes its meaning is a new
version of the routes (`ROUTES`). Limits stand in the types: what breaks one is refused before anything looks at it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

__all__ = [
    "GRID_LIMIT",
    "JSON",
    "MSGPACK",
    "ROUTES",
    "Change",
    "Changes",
    "Coordinate",
    "DpRank",
    "DpRanks",
    "EngineOffer",
    "Problem",
    "Readiness",
    "Registered",
    "Registration",
    "Row",
    "RoomQuery",
    "Tenure",
    "Topology",
    "TableView",
    "decode",
    "encode",
]

ROUTES = "/v1"
"""Version of the routes: the first part of every path but ``/health`` and ``/metrics``."""

MSGPACK, JSON = "application/msgpack", "application/json"
"""Content types that both ends read."""

GRID_LIMIT = 1 << 16
"""Ranks that one topology may declare; a typo must not make the registry count to 10**18."""

_Text = Annotated[str, Meta(max_length=256)]
_Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")]
_Index = Annotated[int, Meta(ge=0, lt=GRID_LIMIT)]
_Size = Annotated[int, Meta(ge=1, le=GRID_LIMIT)]
_Amount = Annotated[int, Meta(ge=0, lt=1 << 53)]
_Port = Annotated[int, Meta(ge=1, le=65535)]
_Room = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Coordinate(Struct, frozen=True, order=True, array_like=True):
    """A rank's place in its group's grid. As text: ``dp0/cp0/tp1/pp0``."""

    dp: _Index = 0
    cp: _Index = 0
    tp: _Index = 0
    pp: _Index = 0

    def __str__(self) -> str:
        return f"dp{self.dp}/cp{self.cp}/tp{self.tp}/pp{self.pp}"


class Topology(Struct, frozen=True, kw_only=True):
    """What every rank of one group (all prefill ranks of a model, say) must declare alike.

    Attributes:
        dp: data-parallel size; the group is ready when each (dp, cp, tp, pp) of the grid has its row.
        cp: size of attention context parallelism.
        tp: size of attention tensor parallelism.
        pp: number of pipeline stages.
        page_size: tokens in a page.
        kv_dtype: of keys and values, such as ``"bfloat16"``.
        kv_layout: name of the order of dimensions in a page; the engine's own word.
        attention: ``"mha"`` (also grouped-query: heads are split over tp) or ``"mla"`` (one latent, the same on every tp rank).
        layers: of the model, over all stages.
        kv_heads: of the model, over all tp ranks; 1 for ``"mla"``.
        head_dim: elements of one head of keys; the latent's width for ``"mla"``.
        model: whatever names the weights; compared as text.
        extra: further texts that must be equal.
    """

    dp: _Size = 1
    cp: _Size = 1
    tp: _Size = 1
    pp: _Size = 1
    page_size: _Size
    kv_dtype: _Text
    kv_layout: _Text = ""
    attention: Literal["mha", "mla"] = "mha"
    layers: _Size
    kv_heads: _Size
    head_dim: _Size
    model: _Text = ""
    extra: Annotated[dict[_Text, _Text], Meta(max_length=64)] = {}

    def __post_init__(self) -> None:
        if self.size > GRID_LIMIT:
            raise ValueError(f"a grid may have {GRID_LIMIT} ranks, found {self.size}")

    @property
    def size(self) -> int:
        """Ranks in the grid."""
        return self.dp * self.cp * self.tp * self.pp

    def __contains__(self, key: Coordinate) -> bool:
        return key.dp < self.dp and key.cp < self.cp and key.tp < self.tp and key.pp < self.pp

    def places(self) -> Iterator[Coordinate]:
        """Every coordinate of the grid, in order."""
        for place in itertools.product(range(self.dp), range(self.cp), range(self.tp), range(self.pp)):
            yield Coordinate(*place)

    def difference(self, other: Topology) -> dict[str, tuple[Any, Any]]:
        """Field -> (here, there) of what differs."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__struct_fields__)
        return {name: (mine, theirs) for name, mine, theirs in pairs if mine != theirs}


class EngineOffer(Struct, frozen=True):
    """A transfer engine that a rank has open: its name, and `TransferEngine.metadata`."""

    name: _Name
    metadata: Annotated[bytes, Meta(max_length=1 << 16)] = b""


class Row(Struct, frozen=True, kw_only=True):
    """Where one rank is reached, and which process it is.

    Attributes:
        key: its place in the grid.
        host: address or name that peers reach; never a wildcard.
        port: of its channel (messages between peers).
        instance: of the process; random, new after each start (`commplane_disagg.registry.new_instance`).
        epoch: how often this rank was restarted. A higher one takes a row over at once; an equal one of another instance has to
            wait until the row's lease has ended; a lower one is refused.
        engines: what it has open, best first.
        extra: further texts for peers, not compared.
    """

    key: Coordinate
    host: Annotated[str, Meta(max_length=255)]
    port: _Port
    instance: _Name
    epoch: _Amount = 0
    engines: Annotated[tuple[EngineOffer, ...], Meta(max_length=8)] = ()
    extra: Annotated[dict[_Text, _Text], Meta(max_length=64)] = {}

    def engine(self, name: str) -> EngineOffer | None:
        """The offer of that name."""
        return next((offer for offer in self.engines if offer.name == name), None)


class Registration(Struct, frozen=True, kw_only=True):
    """PUT rows. `peer_address`: put the address this request came from in the place of a wildcard or loopback host."""

    topology: Topology
    row: Row
    peer_address: bool = False


class Registered(Struct, frozen=True, kw_only=True):
    """The answer to a registration or a renewal.

    Attributes:
        server: of this start of the registry; another one means that it has forgotten everything.
        sequence: of the last change.
        lease: seconds until the row goes, unless it is renewed.
        host: the row's, as stored.
    """

    server: str
    sequence: int
    lease: float
    host: str


class Tenure(Struct, frozen=True, kw_only=True):
    """POST renewals, POST withdrawals: this instance's hold on a row."""

    key: Coordinate
    instance: _Name
    epoch: _Amount = 0


class TableView(Struct, frozen=True, kw_only=True):
    """GET table: everything, in one answer. `topology` is None while no rank has registered, `lease` is in seconds."""

    server: str
    sequence: int
    topology: Topology | None
    ready: bool
    rows: tuple[Row, ...]
    lease: float = 0.0

    def row(self, key: Coordinate) -> Row | None:
        """The row of one place."""
        return next((row for row in self.rows if row.key == key), None)


class Readiness(Struct, frozen=True, kw_only=True):
    """GET ready: whether the rows' keys are the whole grid; of those missing, the first 256 and the number of all."""

    server: str
    sequence: int
    topology: Topology | None
    ready: bool
    missing: tuple[Coordinate, ...]
    missing_count: int


class Change(Struct, frozen=True, kw_only=True):
    """One event of the feed.

    Attributes:
        sequence: its number; consecutive.
        kind: a replaced row is one whose rank is another process now: what is known of the old one is void.
        key: whose row.
        instance: that the row has now (registered, replaced) or had (withdrawn, expired).
        epoch: of that instance.
        previous: the instance that was replaced, or "".
        row: the new row, for registered and replaced.
    """

    sequence: int
    kind: Literal["registered", "replaced", "withdrawn", "expired"]
    key: Coordinate
    instance: str
    epoch: int
    previous: str = ""
    row: Row | None = None


class Changes(Struct, frozen=True, kw_only=True):
    """GET changes: those after `since`; `reset` says that some of them are not kept any more, so the table has to be read."""

    server: str
    sequence: int
    reset: bool
    changes: tuple[Change, ...]


class DpRank(Struct, frozen=True, kw_only=True):
    """Which data-parallel rank serves a room. A higher generation of the same room replaces a lower one."""

    room: _Room
    dp: _Index
    generation: _Amount = 0


class DpRanks(Struct, frozen=True, kw_only=True):
    """POST rooms, and the answer to a query: rooms that are not known are left out."""

    rooms: Annotated[tuple[DpRank, ...], Meta(max_length=4096)]


class RoomQuery(Struct, frozen=True, kw_only=True):
    """POST rooms/query."""

    rooms: Annotated[tuple[_Room, ...], Meta(max_length=4096)]


class Problem(Struct, frozen=True, kw_only=True):
    """Every answer that is not 2xx.

    Attributes:
        code: a word to branch on: ``malformed``, ``unauthorized``, ``not_found``, ``unknown_row``, ``topology``, ``claimed``,
            ``stale``, ``address``, ``grid``, ``room``, ``too_large``, ``full``.
        message: one sentence.
        difference: field -> [registered, found], as text, for ``topology``.
        retry_after: seconds after which the same request may succeed; None: it will not.
    """

    code: str
    message: str
    difference: dict[str, tuple[str, str]] = {}
    retry_after: float | None = None


_T = TypeVar("_T")


def encode(value: Struct, content_type: str = MSGPACK) -> bytes:
    """A struct as `MSGPACK` or `JSON`; bytes are base64 in JSON."""
    return msgspec.json.encode(value) if content_type == JSON else msgspec.msgpack.encode(value)


def decode(kind: type[_T], body: bytes, content_type: str = MSGPACK) -> _T:
    """Read and check a struct of `kind`.

    Raises:
        msgspec.DecodeError: not of that format, type or size (`msgspec.ValidationError` says where).
    """
    return msgspec.json.decode(body, type=kind) if content_type == JSON else msgspec.msgpack.decode(body, type=kind)
