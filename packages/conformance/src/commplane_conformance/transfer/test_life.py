"""Connecting, cancelling, disconnecting and closing, and what is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from commplane.errors import CommplaneError
from commplane_conformance.marks import clause
from commplane_conformance.transfer.ends import Ends

MIB = 1 << 20


@clause("T3")
@pytest.mark.timeout(120)
def test_a_cancelled_ticket_ends_once(ends: Ends) -> None:
    writer, reader = ends.pair(16 * MIB)
    tickets = writer.do("submit_many", reader.name, 12, 16 * MIB)
    for ticket in tickets[::2]:
        writer.do("cancel", ticket)
        writer.do("cancel", ticket)
    found = writer.do("ends", tickets, 20.0)
    assert {found[t] for t in tickets[1::2]} == {None}
    for ticket in tickets:
        writer.do("cancel", ticket)  # has ended
    writer.do("cancel", max(tickets) + 1000)  # never was
    assert writer.do("poll", 0.3) == []
    assert writer.do("move", reader.name, [0], [0], 16 * MIB) is None
    assert reader.do("digest") == writer.do("digest")


@clause("T8")
@pytest.mark.timeout(120)
def test_a_disconnect_ends_open_transfers_with_an_error(ends: Ends) -> None:
    writer, reader = ends.pair(32 * MIB)
    tickets = writer.do("submit_many", reader.name, 40, 32 * MIB)
    writer.do("disconnect", reader.name)
    found = writer.do("ends", tickets, 30.0)
    assert any(error for error in found.values()), "40 transfers of 32 MiB were over at once"
    assert writer.do("poll", 0.3) == []
    writer.do("disconnect", reader.name)
    writer.do("disconnect", "nobody")


@clause("T8")
@pytest.mark.timeout(120)
def test_a_peer_that_was_disconnected_can_be_connected_again(ends: Ends) -> None:
    writer, reader = ends.pair(MIB)
    for seed in range(3):
        writer.do("fill", seed)
        assert writer.do("move", reader.name, [0], [0], MIB) is None
        assert reader.do("digest") == writer.do("digest")
        writer.do("disconnect", reader.name)
        writer.connect(reader)


@clause("T8")
@pytest.mark.timeout(120)
def test_to_connect_twice_is_to_connect(ends: Ends) -> None:
    writer, reader = ends.pair(MIB)
    writer.connect(reader)
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    assert reader.do("digest") == writer.do("digest")


@clause("T7")
@pytest.mark.timeout(120)
def test_a_peer_that_was_started_again(ends: Ends) -> None:
    writer, reader = ends.pair(MIB, timeout=5.0)
    old = reader.made
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    reader.kill()
    again = ends.get(MIB, timeout=5.0, name=reader.name)
    with pytest.raises(CommplaneError):  # of the process that is gone
        writer.do("disconnect", reader.name)
        writer.do("connect", reader.name, old)
    writer.do("connect", again.name, again.made)
    assert writer.do("move", again.name, [0], [0], MIB, 30.0) is None
    assert again.do("digest") == writer.do("digest")


@clause("T7")
@pytest.mark.timeout(120)
def test_new_metadata_replaces_old_without_a_disconnect(ends: Ends) -> None:
    writer, reader = ends.pair(MIB, timeout=5.0)
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    reader.kill()
    again = ends.get(MIB, timeout=5.0, name=reader.name)
    writer.connect(again)
    assert writer.do("move", again.name, [0], [0], MIB, 30.0) is None
    assert again.do("digest") == writer.do("digest")


@clause("T8")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", ["writer", "reader"])
def test_close_in_any_order_and_twice(ends: Ends, first: str) -> None:
    writer, reader = ends.pair(MIB, timeout=5.0)
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    pair = [writer, reader] if first == "writer" else [reader, writer]
    for end in pair:
        end.do("close")
        end.do("close")


@clause("T8")
@pytest.mark.timeout(180)
def test_close_leaves_no_descriptor_and_no_thread(ends: Ends) -> None:
    writer, reader = ends.process(), ends.process()
    held = []
    for _ in range(4):
        for end in (writer, reader):
            end.open(5.0)
            end.take_pool(MIB)
        writer.connect(reader)
        assert writer.do("move", reader.name, [0], [0], MIB) is None
        for end in (writer, reader):
            end.do("close")
            end.do("forget")
        held.append([end.do("held") for end in (writer, reader)])
    # A library may keep what it made for its first use; what grows from then on is a leak.
    assert held[1] == held[2] == held[3]


@clause("T8")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["close", "kill"])
def test_no_name_outlives_an_end(ends: Ends, how: str) -> None:
    writer, reader = ends.pair(MIB, timeout=5.0)
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    names = {*writer.do("names"), *reader.do("names")}
    for end in (writer, reader):
        if how == "kill":
            end.kill()
        else:
            end.do("close")
            end.do("forget")
    sockets = {line.split(maxsplit=7)[-1] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    left = sorted(n for n in names if (n in sockets) or (n.startswith("/") and os.path.lexists(n)))
    assert not left, f"left behind after {how}: {left}"


@clause("T8")
@pytest.mark.timeout(120)
def test_close_with_open_transfers_returns(ends: Ends) -> None:
    writer, reader = ends.pair(32 * MIB, timeout=5.0)
    tickets = writer.do("submit_many", reader.name, 40, 32 * MIB)
    writer.do("close")
    found = writer.do("ends", tickets, 10.0)
    assert any(error for error in found.values())
    reader.do("close")
