"""The wire schema: what is written is read again, in both formats, and limits hold."""

from __future__ import annotations

import inspect

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import commplane_disagg.wire as wire
from commplane_disagg.wire import (
    JSON,
    MSGPACK,
    Change,
    Changes,
    Coordinate,
    DpRank,
    DpRanks,
    EngineOffer,
    Problem,
    Readiness,
    Registered,
    Registration,
    RoomQuery,
    Row,
    TableView,
    Tenure,
    Topology,
    decode,
    encode,
)

pytestmark = pytest.mark.timeout(60)

STRUCTS = [
    kind
    for _, kind in inspect.getmembers(wire, inspect.isclass)
    if issubclass(kind, msgspec.Struct) and kind is not msgspec.Struct
]
FACTS = {"page_size": 16, "kv_dtype": "bfloat16", "layers": 4, "kv_heads": 2, "head_dim": 8}


GRID = Topology(**FACTS, tp=2, extra={"rope": "neox"})
ROW = Row(
    key=Coordinate(0, 0, 1, 0),
    host="2001:db8::1",
    port=65535,
    instance="a:b-c.d_1",
    epoch=3,
    engines=(EngineOffer("shm", bytes(range(256))), EngineOffer("tcp")),
    extra={"é": "\U0001f600"},
)
CHANGE = Change(sequence=7, kind="replaced", key=ROW.key, instance="b", epoch=3, previous="a", row=ROW)
EXAMPLES = [
    ROW.key,
    GRID,
    ROW.engines[0],
    ROW,
    Registration(topology=GRID, row=ROW, peer_address=True),
    Registered(server="s", sequence=1, lease=2.5, host="h"),
    Tenure(key=ROW.key, instance="a", epoch=1),
    TableView(server="s", sequence=1, topology=GRID, ready=False, rows=(ROW,), lease=1.0),
    TableView(server="s", sequence=0, topology=None, ready=False, rows=()),
    Readiness(server="s", sequence=1, topology=GRID, ready=False, missing=(Coordinate(),), missing_count=1),
    CHANGE,
    Changes(server="s", sequence=7, reset=False, changes=(CHANGE,)),
    DpRank(room=(1 << 63) - 1, dp=3, generation=2),
    DpRanks(rooms=(DpRank(room=0, dp=0),)),
    RoomQuery(rooms=(0, (1 << 63) - 1)),
    Problem(code="topology", message="m", difference={"tp": ("1", "2")}, retry_after=0.5),
]


def test_there_is_an_example_of_every_struct() -> None:
    assert {type(example) for example in EXAMPLES} == set(STRUCTS)


@pytest.mark.parametrize("content_type", [MSGPACK, JSON])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_every_struct_comes_back_as_it_was(example: msgspec.Struct, content_type: str) -> None:
    assert decode(type(example), encode(example, content_type), content_type) == example


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(STRUCTS), st.binary(max_size=300), st.sampled_from([MSGPACK, JSON]))
def test_no_bytes_raise_anything_but_a_decode_error(kind: type[msgspec.Struct], body: bytes, content_type: str) -> None:
    try:
        value = decode(kind, body, content_type)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert decode(kind, encode(value)) == value


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"tp": 0}, "tp"),
        ({"tp": 65537}, "tp"),
        ({"tp": 1024, "dp": 1024}, "65536 ranks, found 1048576"),
        ({"attention": "other"}, "attention"),
        ({"kv_dtype": "x" * 300}, "kv_dtype"),
        ({"page_size": 1.5}, "page_size"),
    ],
)
def test_a_topology_outside_of_its_limits_is_refused(changed: dict[str, object], where: str) -> None:
    body = msgspec.json.encode({**FACTS, **changed})
    with pytest.raises(msgspec.ValidationError, match=where):
        decode(Topology, body, JSON)


@pytest.mark.parametrize(
    "changed",
    [
        {"port": 0},
        {"port": 70000},
        {"instance": ""},
        {"instance": "a b"},
        {"epoch": -1},
        {"key": [0, 0, -1, 0]},
        {"key": [0, 0, 0, 0.5]},
        {"host": None},
        {"engines": [["tcp", "!"]]},
        {"engines": [{"name": "tcp"}] * 9},
        {"extra": {"a": 1}},
    ],
)
def test_a_row_outside_of_its_limits_is_refused(changed: dict[str, object]) -> None:
    body = msgspec.json.encode({"key": [0, 0, 0, 0], "host": "h", "port": 1, "instance": "a", **changed})
    with pytest.raises(msgspec.ValidationError):
        decode(Row, body, JSON)


def test_metadata_of_an_engine_is_at_most_what_the_contract_allows() -> None:
    row = Row(key=Coordinate(), host="h", port=1, instance="a", engines=(EngineOffer("tcp", bytes(1 << 16)),))
    assert decode(Row, encode(row)) == row
    longer = msgspec.structs.replace(row, engines=(EngineOffer("tcp", bytes((1 << 16) + 1)),))
    with pytest.raises(msgspec.ValidationError, match="metadata"):
        decode(Row, encode(longer))


def test_a_field_that_an_older_end_does_not_know_is_passed_over() -> None:
    body = msgspec.json.encode({"key": [0, 0, 0, 0], "host": "h", "port": 1, "instance": "a", "brought by a later version": 1})
    assert decode(Row, body, JSON) == Row(key=Coordinate(), host="h", port=1, instance="a")


def test_a_grid_lists_its_places_once_each_and_knows_them() -> None:
    grid = Topology(**FACTS, dp=2, cp=2, tp=3, pp=2)
    places = list(grid.places())
    assert len(places) == len(set(places)) == grid.size == 24
    assert places == sorted(places)
    assert all(place in grid for place in places)
    assert Coordinate(0, 0, 3, 0) not in grid
    assert str(Coordinate(1, 0, 2, 1)) == "dp1/cp0/tp2/pp1"


def test_topologies_say_what_differs() -> None:
    assert Topology(**FACTS).difference(Topology(**FACTS)) == {}
    other = Topology(**{**FACTS, "page_size": 32}, model="b")
    assert Topology(**FACTS, model="a").difference(other) == {"page_size": (16, 32), "model": ("a", "b")}


def test_a_row_finds_its_offer_by_name() -> None:
    row = Row(key=Coordinate(), host="h", port=1, instance="a", engines=(EngineOffer("shm"), EngineOffer("tcp", b"x")))
    assert row.engine("tcp") == EngineOffer("tcp", b"x")
    assert row.engine("nixl") is None
