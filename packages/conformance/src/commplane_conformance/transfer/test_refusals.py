"""What is refused, in one sentence, before anything is written."""

from __future__ import annotations

import pytest

from commplane.errors import CommplaneError
from commplane_conformance.marks import clause
from commplane_conformance.transfer.ends import Ends

SIZE = 65_536


@clause("T4")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("local", "remote", "nbytes"),
    [
        pytest.param([0], [SIZE - 10], 11, id="remote-end"),
        pytest.param([SIZE - 10], [0], 11, id="local-end"),
        pytest.param([0], [-1], 10, id="remote-below-zero"),
        pytest.param([-1], [0], 10, id="local-below-zero"),
        pytest.param([0], [1 << 62], 10, id="remote-far-away"),
        pytest.param([0], [0], SIZE + 1, id="larger-than-the-pool"),
        pytest.param([0], [0], 0, id="nothing"),
        pytest.param([0], [0], -5, id="size-below-zero"),
        pytest.param([0, 100], [0], 10, id="fewer-remote"),
        pytest.param([0], [0, 100], 10, id="fewer-local"),
        pytest.param([0, 100], [0, 100], [10], id="fewer-sizes"),
        pytest.param([0, 100, 200], [0, 100, SIZE], [10, 10, 1], id="only-the-last-one"),
    ],
)
def test_a_piece_outside_of_a_pool_and_nothing_of_its_transfer_is_written(
    ends: Ends, local: list[int], remote: list[int], nbytes: int | list[int]
) -> None:
    writer, reader = ends.pair(SIZE)
    with pytest.raises(CommplaneError):
        writer.do("submit", reader.name, local, remote, nbytes)
    assert writer.do("poll", 0.3) == []
    assert reader.do("read", 0, SIZE) == bytes(SIZE)
    assert writer.do("move", reader.name, [0], [0], SIZE) is None


@clause("T4")
@pytest.mark.timeout(120)
def test_a_pool_that_is_smaller_over_there(ends: Ends) -> None:
    writer, reader = ends.get(SIZE), ends.get(SIZE // 2)
    writer.connect(reader)
    with pytest.raises(CommplaneError):
        writer.do("submit", reader.name, [0], [0], SIZE // 2 + 1)
    assert writer.do("move", reader.name, [SIZE // 2], [0], SIZE // 2) is None


@clause("T4")
@pytest.mark.timeout(120)
def test_a_peer_that_is_not_connected(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE)
    with pytest.raises(CommplaneError, match="nobody"):
        writer.do("submit", "nobody", [0], [0], 1)
    writer.do("disconnect", reader.name)
    with pytest.raises(CommplaneError, match=reader.name):
        writer.do("submit", reader.name, [0], [0], 1)
    assert reader.do("read", 0, SIZE) == bytes(SIZE)


@clause("T5")
@pytest.mark.timeout(120)
def test_metadata_is_at_most_64_kib_and_stays_the_same(ends: Ends) -> None:
    end = ends.get(SIZE)
    assert 0 < len(end.made) <= 65_536
    assert end.do("metadata") == end.made


@clause("T5")
@pytest.mark.timeout(180)
def test_metadata_that_is_not_whole_or_not_of_this_engine(ends: Ends) -> None:
    writer, reader = ends.get(SIZE), ends.get(SIZE)
    made = reader.made
    flipped = bytearray(made)
    flipped[len(made) // 2] ^= 0xFF
    wrong = [b"", b"\0", made[:-1], made[: len(made) // 2], made + b"\0", bytes(flipped), b"\xff" * 300, b"{}", bytes(len(made))]
    for metadata in wrong:
        with pytest.raises(CommplaneError):
            writer.do("connect", reader.name, metadata)
        with pytest.raises(CommplaneError):
            writer.do("submit", reader.name, [0], [0], 1)
    writer.connect(reader)
    assert writer.do("move", reader.name, [0], [0], SIZE) is None


@clause("T4")
@pytest.mark.timeout(120)
def test_a_second_pool(ends: Ends) -> None:
    assert ends.get(SIZE).do("try_pool", SIZE)


@clause("T4")
@pytest.mark.timeout(120)
def test_a_setting_that_the_engine_has_not_got(ends: Ends) -> None:
    process = ends.process()
    with pytest.raises(CommplaneError, match="no_such_setting"):
        process.open(30.0, {"no_such_setting": 1})


@clause("T8")
@pytest.mark.timeout(120)
def test_calls_after_close(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE)
    writer.do("close")
    with pytest.raises(CommplaneError):
        writer.do("submit", reader.name, [0], [0], 1)
    with pytest.raises(CommplaneError):
        writer.connect(reader)
