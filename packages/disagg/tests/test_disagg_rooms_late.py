"""What comes late, from a peer that was stopped or for an earlier use of a room, touches nothing that is in use again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from disagg_held import HeldEngine
from disagg_sides import Side, expect, fill, run_until

from commplane.errors import CommplaneError
from commplane_disagg.channel.messages import Abort, Ack, Drained, Failed, Message, Want, Written
from commplane_disagg.ends import DecodeEnd, PrefillEnd
from commplane_disagg.ranks import Grid
from commplane_disagg.rooms import Key, RoomTable, Status

pytestmark = pytest.mark.timeout(60)

HURRY: dict[str, Any] = {"silence": 0.4, "lost_after": 0.2, "drain_timeout": 0.2, "beat": 0.1}


@pytest.fixture
def pair() -> Iterator[Callable[..., tuple[Side, Side]]]:
    """One prefill rank and one decode rank, over an engine that the test holds back."""
    made: list[Side] = []

    def make(*, quiet: bool = True, capabilities: tuple[str, ...] = ("quiet",), **settings: Any) -> tuple[Side, Side]:
        common = {"engine": lambda: HeldEngine(quiet=quiet), "capabilities": capabilities, **settings}
        made.extend((Side(PrefillEnd, **common), Side(DecodeEnd, **common)))
        fill(made[0])
        return made[0], made[1]

    yield make
    for side in made:
        side.close()


def wanted(p: Side, d: Side, room: int = 7, generation: int = 0) -> None:
    """Step until prefill knows where decode's pages are."""
    run_until(lambda: p.ends[0].status(room, generation=generation) == Status.WAITING, p, d)


def poison(d: Side, pages: list[int]) -> Callable[[], bool]:
    """Fill freed pages with a pattern; whether it is still there."""
    pool, size = d.pools[0], d.ends[0].card.layout.page_bytes
    for page in pages:
        pool[page * size : (page + 1) * size] = b"\xa5" * size
    return lambda: all(bytes(pool[page * size : (page + 1) * size]) == b"\xa5" * size for page in pages)


def stopped_prefill(make: Callable[..., tuple[Side, Side]]) -> None:
    """Prefill is stopped after it was told where the pages are; decode gives up; prefill goes on and writes."""
    p, d = make(**HURRY)
    d.ends[0].receive(7, [2, 3], p.source())
    p.ends[0].open_room(7)
    wanted(p, d)
    run_until(lambda: bool(d.quarantined() or d.released()), d)
    assert d.results() == [(7, 0, False)] and d.released() == []
    with pytest.raises(CommplaneError, match="page 3 still belongs to room 7 generation 0"):
        d.ends[0].receive(8, [3], p.source())
    p.ends[0].send(7, [0, 1])  # it does not know yet, and its engine writes
    p.ends[0].engine.let_go()
    run_until(lambda: d.released() == [7] and p.released() == [7], p, d)
    assert p.results() == [(7, 0, False)]
    intact = poison(d, [2, 3])
    d.ends[0].receive(7, [3], p.source(), generation=1)
    p.ends[0].send(7, [5], generation=1)
    run_until(lambda: bool(p.ends[0].engine.held), p, d)
    assert intact()
    p.ends[0].engine.let_go()
    run_until(lambda: d.results()[-1] == (7, 1, True), p, d)
    poison(d, [2])
    size = d.ends[0].card.layout.page_bytes
    assert bytes(d.pools[0][3 * size : 4 * size]) == bytes(p.pools[0][5 * size : 6 * size])


def test_pages_of_a_stopped_writer_are_not_used_again_before_it_has_said_that_it_is_done(pair: Any) -> None:
    stopped_prefill(pair)


def test_that_test_finds_pages_that_are_freed_by_a_timer(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drain = RoomTable._drain
    monkeypatch.setattr(RoomTable, "_drain", lambda self, room: 2 if room.stuck else drain(self, room))
    with pytest.raises(AssertionError):
        stopped_prefill(pair)


def soon(*sides: Side) -> None:
    """Enough steps for whatever is on its way."""
    for _ in range(30):
        for side in sides:
            side.step()
        time.sleep(0.001)


TO_PREFILL: list[Message] = [Ack(7, 0), Abort(7, 0, 3, "d", "old"), Want(7, 0, 1, [9])]
TO_DECODE: list[Message] = [Written(7, 0, 1), Failed(7, 0, 3, "p", "old"), Drained(7, 0, clean=True)]


def late_message(make: Callable[..., tuple[Side, Side]], message: Message, to: str) -> None:
    """Room 7 was used and is used again; then something is said of its first use."""
    p, d = make()
    for generation in (0, 1):
        d.ends[0].receive(7, [2 + generation], p.source(), generation=generation)
        p.ends[0].send(7, [generation], generation=generation)
        run_until(lambda: bool(p.ends[0].engine.held), p, d)
        if generation == 0:
            d.ends[0].abort(7, why="the client left")
            run_until(lambda: d.released() == [7] and p.released() == [7], p, d)
    soon(p, d)
    speaker, hearer = (d, p) if to == "prefill" else (p, d)
    before = hearer.ends[0].status(7, generation=1)
    assert speaker.ends[0].channel.send(hearer.ends[0].name, message)
    soon(p, d)
    assert hearer.ends[0].status(7, generation=1) == before
    assert [r[:2] for r in p.results()] == [(7, 0)] == [r[:2] for r in d.results()]
    p.ends[0].engine.let_go()
    run_until(lambda: p.results()[1:] == [(7, 1, True)] == d.results()[1:], p, d)
    expect(d, 0, {3: 1})


@pytest.mark.parametrize("message", TO_PREFILL, ids=lambda m: type(m).__name__)
def test_a_late_word_of_decode_does_not_touch_a_room_that_is_used_again(pair: Any, message: Message) -> None:
    late_message(pair, message, "prefill")


@pytest.mark.parametrize("message", TO_DECODE, ids=lambda m: type(m).__name__)
def test_a_late_word_of_prefill_does_not_touch_a_room_that_is_used_again(pair: Any, message: Message) -> None:
    late_message(pair, message, "decode")


@pytest.mark.parametrize("message", [TO_PREFILL[1], TO_DECODE[0], TO_DECODE[1]], ids=lambda m: type(m).__name__)
def test_those_tests_find_a_table_that_ignores_generations(pair: Any, message: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoomTable, "get", lambda self, key: self.rooms.get(key.room))
    with pytest.raises((AssertionError, IndexError)):
        late_message(pair, message, "prefill" if message in TO_PREFILL else "decode")


def test_a_room_that_drains_refuses_its_number_and_an_old_generation_is_refused_for_good(pair: Any) -> None:
    p, d = pair(drain_timeout=0.1)
    d.ends[0].receive(7, [2], p.source())
    p.ends[0].send(7, [1])
    run_until(lambda: bool(p.ends[0].engine.held), p, d)
    d.ends[0].abort(7)
    run_until(lambda: d.quarantined() == [7], d)
    with pytest.raises(CommplaneError, match="room 7 generation 0 is still QUARANTINED"):
        d.ends[0].receive(7, [4], p.source(), generation=1)
    run_until(lambda: d.released() == [7], p, d)
    with pytest.raises(CommplaneError, match="use a generation above 0"):
        d.ends[0].receive(7, [4], p.source())
    assert d.ends[0].ledger.holders(4) == ()


def test_a_transfer_that_failed_without_the_promise_to_be_quiet_leaves_its_pages_in_quarantine(pair: Any) -> None:
    p, d = pair(quiet=False, capabilities=())
    d.ends[0].receive(7, [2], p.source())
    p.ends[0].send(7, [1])
    run_until(lambda: bool(p.ends[0].engine.held), p, d)
    p.ends[0].engine.fail("the cable is cut")
    run_until(lambda: d.quarantined() == [7] == p.quarantined(), p, d)
    assert "cancel" not in p.ends[0].engine.calls
    assert d.released() == [] == p.released()
    assert d.ends[0].stats()["pages_quarantined"] == 1


def test_a_fenced_end_shuts_the_writer_out_and_has_its_pages_back(pair: Any) -> None:
    p, d = pair(quiet=False, capabilities=("fenced",))
    d.ends[0].receive(7, [2], p.source())
    p.ends[0].send(7, [1])
    run_until(lambda: bool(p.ends[0].engine.held), p, d)
    assert "disconnect prefill/0" not in d.ends[0].engine.calls
    p.ends[0].engine.fail("the cable is cut")
    run_until(lambda: d.released() == [7], p, d)
    assert "disconnect prefill/0" in d.ends[0].engine.calls
    d.ends[0].receive(8, [2], p.source())
    p.ends[0].send(8, [4])
    run_until(lambda: bool(p.ends[0].engine.held), p, d)
    assert p.ends[0].engine.calls[-2:] == ["disconnect decode/0", "connect decode/0"]  # after a failure, anew
    p.ends[0].engine.let_go()
    run_until(lambda: d.results()[-1] == (8, 0, True), p, d)


def test_an_end_on_the_machine_of_a_dead_one_vouches_for_its_death() -> None:
    """Decode is elsewhere and cannot look; rank 1 is on the machine of rank 0, which is killed."""
    p = Side(PrefillEnd, Grid(tp=2), engine=HeldEngine, has_ended=lambda who: who.pid == os.getpid(), **HURRY)
    d = Side(DecodeEnd, Grid(), engine=HeldEngine, has_ended=lambda _who: False, **HURRY)
    try:
        d.ends[0].receive(7, [2], p.source())
        for end in p.ends:
            end.open_room(7)
        run_until(lambda: p.ends[0].status(7) == Status.WAITING, p, d)
        d.ends[0].abort(7)
        for link in list(p.ends[0].channel._links):  # a kernel closes what a killed process had open
            link.sock.close()
        p.ends[0].channel._listener.close()
        until = time.monotonic() + 10
        while not d.released():
            assert time.monotonic() < until
            for event in p.ends[1].channel.poll():
                p.ends[1]._event(event)
            d.step()
        assert d.ends[0].stats()["pages_lent"] == 0
    finally:
        d.close()
        p.ends[1].close()
        p.ends[0].engine.close()


def test_the_word_of_who_knows_lifts_the_quarantine_of_a_lost_peer(pair: Any) -> None:
    p, d = pair(**HURRY)
    d.ends[0].receive(7, [2], p.source())
    p.ends[0].open_room(7)
    wanted(p, d)
    run_until(lambda: d.quarantined() == [7], d)
    assert d.ends[0].peer_died("prefill/0", "another") == 0
    assert d.ends[0].peer_died("prefill/0") == 1
    run_until(lambda: d.released() == [7], d)
    assert Key(7, 0) not in d.ends[0].table.rooms
