"""Pieces, metadata, the handover of memory, and the choice of an engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane.api import TransferContext
from commplane.errors import CommplaneError, PeerError, SelectionError
from commplane_disagg.engines.choose import PREFERENCE, End, choose, mapping_refusal
from commplane_disagg.engines.envelope import seal, unseal
from commplane_disagg.engines.handover import Door
from commplane_disagg.engines.memory import host_identity
from commplane_disagg.engines.pieces import Pieces
from commplane_disagg.engines.shm import SharedMemory, ShmMetadata
from commplane_disagg.engines.tcp.engine import TcpMetadata

SIZE = 65_536
pytestmark = pytest.mark.timeout(60)


@contextlib.contextmanager
def opened(name: str) -> Iterator[tuple[SharedMemory, memoryview]]:
    engine = SharedMemory()
    engine.open(TransferContext(name, timeout=2.0))
    pool = engine.allocate(SIZE)
    engine.register(pool)
    try:
        yield engine, pool
    finally:
        engine.close()


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900), st.integers(1, 99)), max_size=30),
    st.integers(1, 120),
)
def test_joined_runs_are_the_same_bytes(pieces: list[tuple[int, int, int]], most: int) -> None:
    columns = [list(column) for column in zip(*pieces, strict=True)] or [[], [], []]
    runs = list(Pieces("peer", *columns, 1000, 1000).joined(most))
    assert all(0 < n <= most for _, _, n in runs)
    told = [(start + i, to + i) for start, to, n in pieces for i in range(n)]
    assert [(start + i, to + i) for start, to, n in runs for i in range(n)] == told


def test_pages_that_adjoin_become_one_run() -> None:
    pieces = Pieces("peer", range(0, 640, 64), range(1280, 1920, 64), 64, 4096, 4096)
    assert list(pieces.joined(1 << 20)) == [(0, 1280, 640)]


@given(st.binary(max_size=200))
def test_bytes_that_are_no_metadata_are_refused(data: bytes) -> None:
    with pytest.raises(CommplaneError, match="wanted that of engine 'tcp' version 1"):
        unseal("tcp", 1, TcpMetadata, data, "peer")


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_in_metadata_is_found(where: int, bit: int) -> None:
    made = bytearray(seal("tcp", 1, TcpMetadata("host", 1, bytes(32), 5)))
    made[where % len(made)] ^= 1 << bit
    with pytest.raises(CommplaneError):
        unseal("tcp", 1, TcpMetadata, bytes(made), "peer")


def test_metadata_of_another_engine_is_named() -> None:
    with pytest.raises(CommplaneError, match="found that of engine 'tcp' version 1"):
        unseal("shm", 1, ShmMetadata, seal("tcp", 1, TcpMetadata("host", 1, b"", 5)), "peer")


def test_metadata_is_limited() -> None:
    with pytest.raises(CommplaneError, match="at most 65536 bytes"):
        seal("tcp", 1, TcpMetadata("h" * 70_000, 1, b"", 5))


def told(engine: SharedMemory, **changes: object) -> bytes:
    body = unseal("shm", 1, ShmMetadata, engine.metadata(), "peer")
    return seal("shm", 1, ShmMetadata(**{f: changes.get(f, getattr(body, f)) for f in body.__struct_fields__}))


def test_a_peer_of_another_host_is_refused_with_the_reason() -> None:
    with opened("one") as (one, _), opened("two") as (two, _):
        with pytest.raises(CommplaneError, match="wanted one host and network namespace"):
            one.connect("two", told(two, host="elsewhere"))
        assert "another host" in str(mapping_refusal(told(two, host="elsewhere"), "two", 2.0))


def test_a_wrong_token_gets_no_memory() -> None:
    with opened("one") as (one, _), opened("two") as (two, _):
        with pytest.raises(CommplaneError, match=r"refused to hand over its pool|is not there"):
            one.connect("two", told(two, token=bytes(32)))
        one.connect("two", two.metadata())


def test_a_pool_that_is_smaller_than_told_is_not_mapped() -> None:
    with opened("one") as (one, _), opened("two") as (two, _), pytest.raises(CommplaneError, match="wanted a sealed file"):
        one.connect("two", told(two, nbytes=SIZE * 2))


def test_a_file_that_could_shrink_is_not_mapped(tmp_path: Path) -> None:
    fd = os.memfd_create("unsealed")
    os.ftruncate(fd, SIZE)
    door = Door(fd)
    try:
        made = seal("shm", 1, ShmMetadata(host_identity(), door.address, door.token, 0, SIZE, os.getpid()))
        with opened("one") as (one, _), pytest.raises(CommplaneError, match="wanted a sealed file"):
            one.connect("two", made)
    finally:
        door.close()
        os.close(fd)


def test_memory_that_is_not_the_engines_can_be_read_but_not_written() -> None:
    two = SharedMemory()
    two.open(TransferContext("two", timeout=2.0))
    two.register(memoryview(bytearray(SIZE)))
    with opened("one") as (one, pool):
        with pytest.raises(CommplaneError, match="wanted memory from its engine's allocate"):
            one.connect("two", two.metadata())
        two.pool[:5] = b"12345"
        two.connect("one", one.metadata())
        two.submit("one", [0], [10], 5)
        assert two.poll(2.0)[0].error is None
        assert bytes(pool[8:18]) == b"\0\x0012345\0\0\0"
    two.close()


def test_a_peer_that_has_closed_is_not_there() -> None:
    with opened("one") as (one, _):
        with opened("two") as (two, _):
            made = two.metadata()
        with pytest.raises(PeerError, match="is not there"):
            one.connect("two", made)
        assert "is not there" in str(mapping_refusal(made, "two", 2.0))


def test_memory_that_can_be_mapped_is_found_so() -> None:
    with opened("one") as (one, _), opened("two"):
        for _ in range(3):
            assert mapping_refusal(one.metadata(), "one", 2.0) is None


names = st.lists(st.sampled_from([*PREFERENCE, "theirs"]), unique=True)
mappings = st.sampled_from([None, "it is on another host"])


@settings(max_examples=300)
@given(names, names, mappings, mappings)
def test_both_ends_choose_the_same(mine: list[str], theirs: list[str], here: str | None, there: str | None) -> None:
    one, two = End("one", mine, here), End("two", theirs, there)
    both = [name for name in PREFERENCE if name in mine and name in theirs]
    usable = [name for name in both if name != "shm" or (here is None and there is None)]
    if usable:
        assert choose(one, two) == choose(two, one)
        assert choose(one, two).engine == usable[0]
        return
    texts = []
    for pair in ((one, two), (two, one)):
        with pytest.raises(SelectionError) as caught:
            choose(*pair)
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and "open tcp at both" in texts[0]


def test_shared_memory_is_taken_only_if_both_have_mapped_it() -> None:
    every = ["tcp", "shm"]
    assert choose(End("a", every, None), End("b", every, None)).engine == "shm"
    one_way = choose(End("a", every, None), End("b", every, "no descriptor left"))
    assert one_way.engine == "tcp"
    assert one_way.refused == (("shm", "b: no descriptor left"), ("nixl", "a and b did not open it"),
                               ("mooncake", "a and b did not open it"))  # fmt: skip
