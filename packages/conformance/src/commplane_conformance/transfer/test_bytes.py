"""Bytes arrive where they were sent, bit for bit, and nothing beside them changes."""

from __future__ import annotations

import random

import pytest

from commplane_conformance.marks import clause, needs
from commplane_conformance.provider import EngineSubject
from commplane_conformance.transfer.ends import Ends

MIB = 1 << 20


def scattered(seed: int, pool: int, most: int, count: int) -> tuple[list[int], list[int], list[int]]:
    """Pieces of odd sizes at odd offsets, which do not overlap in the peer's pool: local and remote offsets, and sizes."""
    rng = random.Random(seed)
    local: list[int] = []
    remote: list[int] = []
    sizes: list[int] = []
    at = 0
    while len(sizes) < count:
        size = rng.randint(1, most)
        at += rng.randint(0, most // 3)
        if at + size > pool:
            break
        local.append(rng.randint(0, pool - size))
        remote.append(at)
        sizes.append(size)
        at += size
    order = list(range(len(sizes)))
    rng.shuffle(order)
    return [local[i] for i in order], [remote[i] for i in order], [sizes[i] for i in order]


def expected(before: bytes, source: bytes, local: list[int], remote: list[int], sizes: list[int]) -> bytes:
    """What the peer's pool has to be after such pieces."""
    out = bytearray(before)
    for start, to, size in zip(local, remote, sizes, strict=True):
        out[to : to + size] = source[start : start + size]
    return bytes(out)


@clause("T1")
@needs("network")
@pytest.mark.timeout(120)
def test_a_reader_at_another_address(ends: Ends) -> None:
    writer, reader = ends.get(MIB), ends.process()
    reader.open(30.0, host="127.0.0.2")
    reader.take_pool(MIB)
    writer.do("fill", 2)
    writer.connect(reader)
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    assert reader.do("digest") == writer.do("digest")


@clause("T1")
@pytest.mark.timeout(120)
def test_a_whole_pool(ends: Ends, subject: EngineSubject) -> None:
    size = (256 if subject.full else 32) * MIB + 4096 + 13
    writer, reader = ends.pair(size)
    assert writer.do("move", reader.name, [0], [0], size) is None
    assert reader.do("digest") == writer.do("digest")


@clause("T1")
@pytest.mark.timeout(120)
def test_pages_in_another_order(ends: Ends) -> None:
    page, count = 64 << 10, 64
    writer, reader = ends.pair(page * count)
    remote = list(range(count))
    random.Random(1).shuffle(remote)
    assert writer.do("move", reader.name, [i * page for i in range(count)], [i * page for i in remote], page) is None
    source, found = writer.do("read", 0, page * count), reader.do("read", 0, page * count)
    assert [found[i * page : (i + 1) * page] == source[k * page : (k + 1) * page] for k, i in enumerate(remote)] == [True] * count


@clause("T1")
@pytest.mark.timeout(180)
def test_odd_sizes_at_odd_offsets_and_nothing_beside_them(ends: Ends, subject: EngineSubject) -> None:
    size = 2 * MIB + 7
    writer, reader = ends.pair(size)
    reader.do("fill", 99)
    source, held = writer.do("read", 0, size), reader.do("read", 0, size)
    for seed in range(20 if subject.full else 4):
        pieces = scattered(seed, size, 70_001, 200)
        assert writer.do("move", reader.name, *pieces) is None
        held = expected(held, source, *pieces)
        assert reader.do("read", 0, size) == held, f"seed {seed}"


@clause("T1")
@pytest.mark.timeout(180)
def test_many_small_pieces(ends: Ends, subject: EngineSubject) -> None:
    size = 2 * MIB
    writer, reader = ends.pair(size)
    source = writer.do("read", 0, size)
    pieces = scattered(5, size, 1500, 20_000 if subject.full else 2_500)
    assert len(pieces[0]) > 2_000
    assert writer.do("move", reader.name, *pieces) is None
    assert reader.do("read", 0, size) == expected(bytes(size), source, *pieces)


@clause("T1")
@pytest.mark.timeout(120)
def test_pieces_that_adjoin_at_one_end_only(ends: Ends) -> None:
    writer, reader = ends.pair(4096)
    source = writer.do("read", 0, 4096)
    pieces = ([0, 100, 200, 900], [1000, 1100, 2500, 2600], [100, 100, 100, 7])
    assert writer.do("move", reader.name, *pieces) is None
    assert reader.do("read", 0, 4096) == expected(bytes(4096), source, *pieces)


@clause("T1")
@pytest.mark.timeout(120)
def test_both_directions_at_once(ends: Ends) -> None:
    half = 8 * MIB
    one, two = ends.pair(2 * half)
    two.do("fill", 7)
    two.connect(one)
    first, second = one.do("read", 0, half), two.do("read", half, half)
    calls = [(one, ([0] * 8, two.name, [0] * 8)), (two, ([half] * 8, one.name, [half] * 8))]
    for end, (local, peer, remote) in calls:
        end.post("move", peer, local, remote, half)
    assert [end.answer() for end, _ in calls] == [None, None]
    assert two.do("read", 0, half) == first
    assert one.do("read", half, half) == second


@clause("T1")
@pytest.mark.timeout(120)
def test_one_writer_and_several_readers(ends: Ends) -> None:
    part = MIB + 11
    writer, readers = ends.get(3 * part), [ends.get(part) for _ in range(3)]
    writer.do("fill", 3)
    writer.connect(*readers)
    tickets = [writer.do("submit", reader.name, [n * part], [0], part) for n, reader in enumerate(readers)]
    assert set(writer.do("ends", tickets, 30.0).values()) == {None}
    source = writer.do("read", 0, 3 * part)
    assert [reader.do("read", 0, part) for reader in readers] == [source[n * part : (n + 1) * part] for n in range(3)]


@clause("T1")
@pytest.mark.timeout(120)
def test_several_writers_and_one_reader(ends: Ends) -> None:
    part = MIB + 11
    reader, writers = ends.get(3 * part), [ends.get(part) for _ in range(3)]
    for n, writer in enumerate(writers):
        writer.do("fill", n)
        writer.connect(reader)
    for n, writer in enumerate(writers):
        writer.post("move", reader.name, [0], [n * part], part)
    assert [writer.answer() for writer in writers] == [None] * 3
    assert reader.do("read", 0, 3 * part) == b"".join(writer.do("read", 0, part) for writer in writers)


@clause("T2")
@pytest.mark.timeout(180)
def test_an_end_says_that_the_reader_can_read_it(ends: Ends, subject: EngineSubject) -> None:
    size = 4 * MIB
    writer, reader = ends.pair(size)
    for seed in range(200 if subject.full else 20):
        writer.do("fill", seed)
        assert writer.do("move", reader.name, [0, size // 2], [size // 2, 0], size // 2) is None
        source = writer.do("read", 0, size)
        # The question goes another way than the bytes did, and must not overtake them.
        assert reader.do("read", 0, size) == source[size // 2 :] + source[: size // 2], f"round {seed}"


@clause("T3")
@pytest.mark.timeout(120)
def test_each_of_many_tickets_ends_once(ends: Ends, subject: EngineSubject) -> None:
    writer, reader = ends.pair(MIB)
    tickets = writer.do("submit_many", reader.name, 1000 if subject.full else 200, 5_000)
    assert len(set(tickets)) == len(tickets)
    assert set(writer.do("ends", tickets, 60.0).values()) == {None}
    assert writer.do("poll", 0.5) == []


@clause("T3")
@pytest.mark.timeout(120)
def test_a_transfer_of_nothing_ends_as_moved(ends: Ends) -> None:
    writer, reader = ends.pair(4096)
    assert writer.do("move", reader.name, [], [], 64) is None
    assert writer.do("move", reader.name, [], [], []) is None


@clause("T11")
@pytest.mark.timeout(120)
def test_memory_of_the_callers_own_can_be_sent(ends: Ends) -> None:
    writer, reader = ends.get(MIB, own=True), ends.get(MIB)
    writer.do("fill", 1)
    writer.connect(reader)
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    assert reader.do("digest") == writer.do("digest")


@clause("T11")
@pytest.mark.timeout(120)
def test_memory_that_is_allocated_is_zeroed_and_begins_with_a_page(ends: Ends) -> None:
    assert ends.get().do("allocated", 100_000) == (True, 0)
