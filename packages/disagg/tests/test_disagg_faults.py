"""Prefill and decode as processes that are killed and stopped at each state: an error in time, and no page used too early."""

from __future__ import annotations

import contextlib
import importlib.util
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from disagg_child import Child, contents, make, page, source, wait_for, write_page

from commplane.errors import CommplaneError, PeerError
from commplane.testing import shm_leftovers
from commplane_disagg.ends import Report
from commplane_disagg.rooms import Status

pytestmark = pytest.mark.timeout(60)

PATTERN = b"\xa5" * len(contents(0))


class Here:
    """The end of this process."""

    def __init__(self, side: str, engine: str) -> None:
        self.end, self.pool = make(side, engine)
        self.reports: list[Report] = []

    def step(self) -> None:
        self.reports.append(self.end.step(0.002))

    @property
    def results(self) -> list[tuple[int, int, bool]]:
        return [(r.room, r.generation, r.ok) for report in self.reports for r in report.results]

    @property
    def errors(self) -> list[Any]:
        return [r.error for report in self.reports for r in report.results if r.error is not None]

    @property
    def released(self) -> list[int]:
        return [r.room for report in self.reports for r in report.released]

    @property
    def quarantined(self) -> list[int]:
        return [r.room for report in self.reports for r in report.quarantined]

    def until(self, done: Any, deadline: float = 12.0) -> None:
        wait_for(done, self.step, deadline)


@contextlib.contextmanager
def decode_and_child(engine: str) -> Iterator[tuple[Here, Child]]:
    child, here = Child("prefill", engine), Here("decode", engine)
    try:
        wait_for(lambda: child.hear(0.1) and child.port, here.step)
        yield here, child
    finally:
        here.end.close()
        child.close()


def bring_to(state: str, here: Here, child: Child) -> None:
    """Room 7: pages 0 to 3 of the child's pool into pages 4 to 7 of ours, as far as `state`."""
    if state != "bootstrapping":
        child.tell(do="open", room=7)
        wait_for(lambda: child.has_said(room=7, local="BOOTSTRAPPING"), here.step)
    here.end.receive(7, [4, 5, 6, 7], source(child.port))
    if state == "waiting":
        here.until(lambda: child.has_said(room=7, local="WAITING") and here.end.status(7) == Status.WAITING)
    elif state in ("transferring", "success"):
        child.tell(do="send", room=7, pages=[0, 1, 2, 3])
        here.until(lambda: child.has_said(room=7, local="TRANSFERRING") and page(here.pool, 4)[:8] == contents(0)[:8])
    if state == "success":
        child.tell(do="let go")
        here.until(lambda: here.results == [(7, 0, True)])


def serves_again(here: Here, engine: str) -> None:
    """Freed pages keep what is put there, but for the one that a new room of a new process writes."""
    for number in range(4, 8):
        write_page(here.pool, number, PATTERN)
    child = Child("prefill", engine)
    try:
        wait_for(lambda: child.hear(0.1) and child.port, here.step)
        here.end.receive(7, [5], source(child.port), generation=1)
        child.tell(do="let go")
        child.tell(do="send", room=7, pages=[9], generation=1)
        here.until(lambda: here.results[-1] == (7, 1, True))
        assert page(here.pool, 5) == contents(9)
        assert all(page(here.pool, number) == PATTERN for number in (4, 6, 7))
    finally:
        child.close()


@pytest.mark.parametrize(
    ("state", "engine"),
    [("bootstrapping", "shm"), ("waiting", "shm"), ("transferring", "shm"), ("transferring", "tcp"), ("success", "tcp")],
)
def test_a_killed_prefill_is_an_error_in_time_and_its_pages_come_back(state: str, engine: str) -> None:
    with decode_and_child(engine) as (here, child):
        if state == "bootstrapping":
            child.signal(signal.SIGKILL)
            here.end.receive(7, [4, 5, 6, 7], source(child.port), timeout=1.0)
        else:
            bring_to(state, here, child)
            child.signal(signal.SIGKILL)
        here.until(lambda: here.released == [7])
        if state == "success":
            assert here.results == [(7, 0, True)]
            assert [page(here.pool, 4 + i) for i in range(4)] == [contents(i) for i in range(4)]
        else:
            assert here.results == [(7, 0, False)] and isinstance(here.errors[0], PeerError)
            assert ("not connected to prefill" if state == "bootstrapping" else "prefill is lost") in str(here.errors[0])
            assert here.quarantined == []
        serves_again(here, engine)


@pytest.mark.parametrize("state", ["waiting", "transferring"])
def test_a_stopped_prefill_keeps_its_pages_from_being_used_until_it_has_said_that_it_is_done(state: str) -> None:
    with decode_and_child("shm") as (here, child):
        bring_to(state, here, child)
        child.signal(signal.SIGSTOP)
        here.until(lambda: here.quarantined == [7])
        assert here.results == [(7, 0, False)] and isinstance(here.errors[0], PeerError)
        assert "nothing was heard" in str(here.errors[0]) and here.released == []
        with pytest.raises(CommplaneError, match="page 5 still belongs to room 7 generation 0"):
            here.end.receive(8, [5], source(child.port))
        child.tell(do="let go")  # what it finds when it goes on: to write the rest
        if state == "waiting":
            child.tell(do="send", room=7, pages=[0, 1, 2, 3])
        child.signal(signal.SIGCONT)
        here.until(lambda: here.released == [7] and child.has_said(released=7))
        for number in range(4, 8):
            write_page(here.pool, number, PATTERN)
        child.tell(do="send", room=8, pages=[11])
        here.end.receive(8, [6], source(child.port))
        here.until(lambda: here.results[-1] == (8, 0, True))
        assert page(here.pool, 6) == contents(11)
        assert all(page(here.pool, number) == PATTERN for number in (4, 5, 7))


def test_a_stopped_prefill_that_is_killed_gives_its_pages_back() -> None:
    with decode_and_child("shm") as (here, child):
        bring_to("transferring", here, child)
        child.signal(signal.SIGSTOP)
        here.until(lambda: here.quarantined == [7])
        child.signal(signal.SIGKILL)
        here.until(lambda: here.released == [7])
        serves_again(here, "shm")


@contextlib.contextmanager
def prefill_and_child(engine: str) -> Iterator[tuple[Here, Child]]:
    here = Here("prefill", engine)
    child = Child("decode", engine, peer_port=here.end.port)
    try:
        wait_for(lambda: child.hear(0.1), here.step)
        yield here, child
    finally:
        here.end.close()
        child.close()


@pytest.mark.parametrize("engine", ["shm", "tcp"])
@pytest.mark.parametrize("state", ["waiting", "transferring"])
def test_a_killed_decode_is_an_error_in_time_and_prefill_has_its_pages_back(state: str, engine: str) -> None:
    with prefill_and_child(engine) as (here, child):
        child.tell(do="receive", room=7, pages=[1, 2, 3])
        here.end.open_room(7)
        here.until(lambda: here.end.status(7) == Status.WAITING)
        if state == "transferring":
            here.end.send(7, [4, 5, 6])
            here.until(lambda: here.end.status(7) == Status.TRANSFERRING)
        child.signal(signal.SIGKILL)
        here.until(lambda: here.released == [7])
        assert here.results == [(7, 0, False)]
        assert here.end.stats()["pages_lent"] == 0


def test_a_stopped_decode_is_an_error_in_time_and_hears_of_it_when_it_goes_on() -> None:
    with prefill_and_child("shm") as (here, child):
        child.tell(do="receive", room=7, pages=[1, 2, 3])
        here.end.send(7, [4, 5, 6])
        here.until(lambda: here.end.status(7) == Status.TRANSFERRING)
        child.signal(signal.SIGSTOP)
        here.until(lambda: here.released == [7])
        assert isinstance(here.errors[0], PeerError) and "nothing was heard" in str(here.errors[0])
        child.signal(signal.SIGCONT)
        here.until(lambda: child.has_said(result=7, ok=False) and child.has_said(released=7))
        said = next(s for s in child.said if s.get("result") == 7)
        assert "decode is lost" in said["error"] or "prefill is lost" in said["error"]
        child.tell(do="receive", room=8, pages=[1])
        here.end.engine.holding = False
        here.end.send(8, [4])
        here.until(lambda: here.results[-1] == (8, 0, True) and child.has_said(result=8, ok=True))


@pytest.mark.long
@pytest.mark.parametrize("engine", ["nixl", "mooncake"])
def test_rooms_go_over_an_engine_that_promises_nothing(engine: str) -> None:
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"wants {engine}: pip install 'commplane-disagg[{engine}]'")
    loads = "from commplane_disagg.engines.mooncake import load_mooncake; load_mooncake()"  # not into the process of the tests
    if engine == "mooncake" and subprocess.run([sys.executable, "-c", loads], capture_output=True).returncode:
        pytest.skip("wants mooncake that loads: libibverbs and libnuma of the system, which it is linked with")
    prefill = Child("prefill", engine)
    decode = None
    try:
        wait_for(lambda: prefill.hear(0.1) and prefill.port, lambda: None, 30)
        decode = Child("decode", engine, peer_port=prefill.port)
        prefill.tell(do="let go")
        for room in (1, 2):
            decode.tell(do="receive", room=room, pages=[3, 1, 6])
            prefill.tell(do="send", room=room, pages=[room, 8, 9])
            wait_for(
                lambda room=room: decode.has_said(released=room) and prefill.has_said(released=room),
                lambda: prefill.hear(0.01),
                30,
            )
            said = next(s for s in decode.said if s.get("released") == room)
            assert said["sums"] == [zlib.crc32(contents(number)) for number in (room, 8, 9)]
            assert decode.has_said(result=room, ok=True) and prefill.has_said(result=room, ok=True)
    finally:
        prefill.close()
        if decode is not None:
            decode.close()


def test_nothing_is_left_of_ends_that_were_killed() -> None:
    with decode_and_child("shm") as (here, child):
        bring_to("transferring", here, child)
        child.signal(signal.SIGKILL)
        here.until(lambda: here.released == [7])
    assert shm_leftovers() == set()
