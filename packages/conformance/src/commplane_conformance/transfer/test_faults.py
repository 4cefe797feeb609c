"""Peers that are killed, stopped or absent: every ticket ends, nothing waits past its deadline, and no other peer is touched."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from commplane.errors import CommplaneError, PeerError
from commplane_conformance.marks import clause, needs
from commplane_conformance.transfer.ends import FAULT_SECONDS, Ends, Remote

MIB = 1 << 20
SIZE = 32 * MIB
ENDS_SECONDS = 3 * FAULT_SECONDS + 5.0
"""Within which every ticket of a peer that does not answer has to end, on a machine that is busy."""


def ends_of_late_transfers(writer: Remote, peer: str) -> list[str | None]:
    """What comes of transfers to a peer that is gone: they are refused, or end."""
    try:
        tickets = writer.do("submit_many", peer, 1, SIZE)
    except CommplaneError as error:
        return [str(error)]
    return list(writer.do("ends", tickets, ENDS_SECONDS).values())


@clause("T6")
@pytest.mark.timeout(120)
def test_a_killed_peer(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    assert writer.do("move", reader.name, [0], [0], SIZE) is None
    writer.post("submit_while_it_lives", reader.name, 500, SIZE)
    time.sleep(0.02)
    reader.kill()
    tickets = writer.answer()
    found = writer.do("ends", tickets, ENDS_SECONDS + 10.0)
    assert len(tickets) < 500 or any(error for error in found.values()), "500 transfers were over before the peer was dead"
    late = ends_of_late_transfers(writer, reader.name)
    assert all(late), f"a transfer to a dead peer counts as moved: {late}"


@clause("T6")
@pytest.mark.timeout(120)
def test_a_stopped_peer(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    assert writer.do("move", reader.name, [0], [0], SIZE) is None
    reader.stop()
    tickets = writer.do("submit_many", reader.name, 10, SIZE)
    writer.do("ends", tickets, ENDS_SECONDS)
    reader.go()
    assert reader.do("read", 0, 1)


@clause("T6")
@pytest.mark.timeout(120)
def test_a_ticket_of_a_stopped_peer_can_be_cancelled(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    reader.stop()
    tickets = writer.do("submit_many", reader.name, 4, SIZE)
    for ticket in tickets:
        writer.do("cancel", ticket)
    writer.do("ends", tickets, ENDS_SECONDS)


@clause("T6")
@pytest.mark.timeout(120)
def test_a_stopped_peer_can_be_disconnected_and_the_engine_closed(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    reader.stop()
    tickets = writer.do("submit_many", reader.name, 4, SIZE)
    writer.do("disconnect", reader.name, seconds=ENDS_SECONDS)
    writer.do("ends", tickets, ENDS_SECONDS)
    writer.do("close", seconds=ENDS_SECONDS)


@clause("T6")
@pytest.mark.timeout(120)
def test_to_connect_to_a_dead_peer(ends: Ends) -> None:
    writer, reader = ends.get(MIB, timeout=FAULT_SECONDS), ends.get(MIB, timeout=FAULT_SECONDS)
    reader.kill()
    try:
        writer.do("connect", reader.name, reader.made, seconds=ENDS_SECONDS)
    except PeerError:
        return
    # An engine that connects with the first byte says so then.
    assert all(ends_of_late_transfers(writer, reader.name))


@clause("T6")
@pytest.mark.timeout(120)
def test_to_connect_to_a_stopped_peer_comes_back(ends: Ends) -> None:
    writer, reader = ends.get(SIZE, timeout=FAULT_SECONDS), ends.get(SIZE, timeout=FAULT_SECONDS)
    reader.stop()
    try:
        writer.do("connect", reader.name, reader.made, seconds=ENDS_SECONDS)
    except PeerError:
        pass
    else:
        ends_of_late_transfers(writer, reader.name)
    reader.go()
    assert reader.do("read", 0, 1)


@clause("T7")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_a_lost_peer_bears_on_no_other(ends: Ends, fault: str) -> None:
    writer, lost = ends.pair(SIZE, timeout=FAULT_SECONDS)
    other = ends.get(SIZE, timeout=FAULT_SECONDS)
    writer.connect(other)
    tickets = writer.do("submit_many", lost.name, 10, SIZE)
    lost.kill() if fault == "kill" else lost.stop()
    good = writer.do("submit_many", other.name, 3, SIZE)
    found = writer.do("ends", [*tickets, *good], ENDS_SECONDS)
    assert {found[t] for t in good} == {None}
    assert other.do("digest") == writer.do("digest")
    assert writer.do("move", other.name, [0], [0], SIZE) is None


@clause("T6")
@pytest.mark.timeout(120)
def test_a_killed_writer_does_not_harm_the_reader(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    writer.do("submit_many", reader.name, 20, SIZE)
    writer.kill()
    reader.do("disconnect", writer.name)
    again = ends.get(SIZE, timeout=FAULT_SECONDS, name=writer.name)
    again.do("fill", 5)
    again.connect(reader)
    assert again.do("move", reader.name, [0], [0], SIZE) is None
    assert reader.do("digest") == again.do("digest")


@clause("T9")
@needs("quiet")
@pytest.mark.timeout(120)
def test_nothing_lands_after_the_end_of_a_ticket(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    where = reader.do("where")
    reader.stop()
    tickets = writer.do("submit_many", reader.name, 4, SIZE)
    writer.do("cancel", tickets[-1])
    writer.do("ends", tickets, ENDS_SECONDS)
    writer.do("fill", 1234)  # what would land now is seen
    before = reader.memory(where, SIZE)
    reader.go()
    _, after = reader.do("digests", 1.0)
    assert reader.memory(where, SIZE) == before, "bytes landed after every ticket had ended"
    assert after


@clause("T10")
@needs("fenced")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("writer_is", ["alive", "stopped", "killed"])
def test_nothing_lands_after_the_reader_has_disconnected(ends: Ends, writer_is: str) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    tickets = writer.do("submit_many", reader.name, 60, SIZE)
    if writer_is == "stopped":
        writer.stop()
    elif writer_is == "killed":
        writer.kill()
    reader.do("disconnect", writer.name)
    reader.do("fill", 4321)
    if writer_is == "stopped":
        writer.go()
    before, after = reader.do("digests", 1.0)
    assert after == before, "bytes landed after the reader had disconnected"
    if writer_is != "killed":
        found = writer.do("ends", tickets, ENDS_SECONDS)
        assert any(error for error in found.values())
        writer.do("disconnect", reader.name)
        writer.connect(reader)
        assert writer.do("move", reader.name, [0], [0], SIZE) is None
        assert reader.do("digest") == writer.do("digest")


@clause("T6")
@pytest.mark.timeout(120)
def test_a_reader_that_closes_ends_the_writers_tickets(ends: Ends) -> None:
    writer, reader = ends.pair(SIZE, timeout=FAULT_SECONDS)
    tickets = writer.do("submit_many", reader.name, 60, SIZE)
    reader.do("close")
    found = writer.do("ends", tickets, ENDS_SECONDS)
    assert any(error for error in found.values())


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@clause("T8")
@pytest.mark.timeout(120)
def test_an_end_starts_no_process_that_outlives_it(ends: Ends) -> None:
    writer, reader = ends.pair(MIB, timeout=FAULT_SECONDS)
    assert writer.do("move", reader.name, [0], [0], MIB) is None
    children = {
        int(pid)
        for end in (writer, reader)
        for tasks in Path(f"/proc/{end.pid}/task").iterdir()
        for pid in (tasks / "children").read_text().split()
    }
    writer.kill()
    reader.kill()
    deadline = time.monotonic() + ENDS_SECONDS
    while left := [pid for pid in children if alive(pid)]:
        assert time.monotonic() < deadline, f"processes {left} outlive the ends that started them"
        time.sleep(0.05)
