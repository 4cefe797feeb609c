"""Rooms that fail: on every rank of both sides, in one step of each, with the first cause, and with their pages back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from disagg_held import HeldEngine
from disagg_sides import KV, TOKEN, Side, fill, layout_of, run_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from commplane.errors import CommplaneError, ConfigError, PeerError, UnsupportedOperation
from commplane.testing import SimulatedRounds
from commplane_disagg.channel import Channel
from commplane_disagg.channel import messages as m
from commplane_disagg.ends import Address, DecodeEnd, KvLayout, PrefillEnd, PrefillReplica
from commplane_disagg.ends.card import Card, encode_card
from commplane_disagg.ends.metrics import EndCollector
from commplane_disagg.ranks import Grid
from commplane_disagg.rooms import CAPACITY, ROOMS, Status
from commplane_disagg.rooms.schema import LANES

pytestmark = pytest.mark.timeout(60)

P2, D2 = Grid(tp=2), Grid(tp=2)
HURRY: dict[str, Any] = {"silence": 0.4, "lost_after": 0.2, "beat": 0.1}


class Pair:
    """Two prefill ranks, two decode ranks, and an engine that the test holds back."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.p = Side(PrefillEnd, P2, engine=HeldEngine, **settings)
        self.d = Side(DecodeEnd, D2, engine=HeldEngine, **settings)
        self.extra: list[Side] = []
        fill(self.p)

    def start(self, room: int = 7, pages: int = 2, **how: Any) -> None:
        for end in self.d.ends:
            end.receive(room, list(range(2, 2 + pages)), self.p.source(), **how)
        for end in self.p.ends:
            end.send(room, list(range(pages)), **how)

    def held(self) -> bool:
        return all(end.engine.held for end in self.p.ends)

    def until(self, done: Callable[[], Any], **how: Any) -> None:
        run_until(lambda: bool(done()), self.p, self.d, **how)

    def ended(self, *, ok: bool, room: int = 7) -> None:
        """Both sides end on all ranks, with the same words but for who speaks, and all pages are back."""
        sides = (self.p, self.d)
        self.until(lambda: all(s.released(r) == [room] for s in sides for r in range(2)))
        for side in sides:
            assert [side.results(r) for r in range(2)] == [[(room, 0, ok)]] * 2
            steps = [[i for i, report in enumerate(side.reports[r]) if report.results] for r in range(2)]
            assert steps[0] == steps[1]
            tails = {text.split(" failed ")[-1] for r in range(2) for text in side.errors(r)}
            assert len(tails) <= 1
            assert all(len(end.ledger) == 0 for end in side.ends)

    def close(self) -> None:
        for side in (self.p, self.d, *self.extra):
            side.close()


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(**getattr(request, "param", {}))
    yield made
    made.close()


def test_a_room_succeeds_only_after_every_rank_has_everything(pair: Pair) -> None:
    pair.start()
    pair.until(pair.held)
    pair.p.ends[0].engine.let_go()
    for _ in range(30):
        pair.p.step()
        pair.d.step()
        time.sleep(0.001)
    assert pair.d.results() == [] == pair.p.results()
    assert pair.d.ends[0].table.rooms[7].local == Status.SUCCESS
    assert pair.d.ends[0].status(7) == pair.d.ends[1].status(7) == Status.WAITING
    pair.p.ends[1].engine.let_go()
    pair.ended(ok=True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("moment", ["at once", "wanted", "writing", "half written"])
def test_an_abort_on_one_rank_fails_the_room_on_all_ranks_of_both_sides(pair: Pair, side: str, rank: int, moment: str) -> None:
    pair.start()
    if moment == "wanted":
        pair.until(lambda: pair.p.ends[0].status(7) == Status.WAITING or pair.held())
    elif moment != "at once":
        pair.until(pair.held)
    if moment == "half written":
        pair.p.ends[0].engine.let_go()
    which = pair.p if side == "prefill" else pair.d
    which.ends[rank].abort(7, why="the client left")
    pair.ended(ok=False)
    assert all(f"{side}/{rank}: the client left" in text for s in (pair.p, pair.d) for r in range(2) for text in s.errors(r))
    assert f"first on rank {rank}" in which.errors(0)[0]


def test_an_engine_that_fails_on_one_rank_fails_the_room_everywhere_with_its_words(pair: Pair) -> None:
    pair.start()
    pair.until(pair.held)
    pair.p.ends[1].engine.fail("the cable is cut")
    pair.ended(ok=False)
    for side in (pair.p, pair.d):
        for rank in range(2):
            (text,) = side.errors(rank)
            assert text.startswith(f"{side.name} rank {rank}/2 room 7 generation 0 failed (transfer engine, first on rank ")
            assert "prefill/1: to decode/1: the cable is cut" in text
    assert "first on rank 1)" in pair.p.errors()[0]


def test_of_two_causes_in_one_step_the_nearer_to_the_root_is_told(pair: Pair) -> None:
    pair.start()
    pair.until(pair.held)
    pair.p.ends[0].abort(7, why="the client left")
    pair.p.ends[1].engine.fail("the cable is cut")
    pair.ended(ok=False)
    assert all("the cable is cut" in pair.p.errors(rank)[0] for rank in range(2))


def test_a_deadline_names_who_is_missing(pair: Pair) -> None:
    for end in pair.d.ends:
        end.receive(7, [1], pair.p.source(), timeout=0.3)
    pair.until(lambda: pair.d.results())
    (text,) = pair.d.errors()
    assert "nothing was said of the end of the writes of prefill/0" in text
    for end in pair.p.ends:
        end.send(8, [1], timeout=0.2)
    pair.until(lambda: pair.p.errors())
    assert "no decode rank asked for it" in pair.p.errors()[0]
    assert isinstance(pair.p.reports[0][-1].results[0].error, PeerError)


def test_a_prefill_that_nobody_answers_for_is_named_with_the_reason(pair: Pair) -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as text:
        closed = int(text.read().split()[1]) + 1
    nobody = PrefillReplica(P2, {0: Address("prefill/0", "127.0.0.1", closed), 1: Address("prefill/1", "127.0.0.1", closed)})
    for end in pair.d.ends:
        end.receive(7, [1], nobody, timeout=0.4)
    run_until(lambda: bool(pair.d.results()), pair.d)
    pair.d.step()
    assert "not connected to prefill/0 (connection lost: [Errno 111]" in pair.d.errors()[0]
    assert pair.d.released() == [7]  # nobody was told where the pages are


@pytest.mark.parametrize("when", ["wanted", "writing"])
def test_a_connection_that_comes_back_in_time_costs_nothing(pair: Pair, when: str) -> None:
    for end in pair.d.ends:
        end.receive(7, [3, 4], pair.p.source())
    for end in pair.p.ends:
        end.send(7, [0], last=False) if when == "writing" else end.open_room(7)
    pair.until(pair.held if when == "writing" else lambda: pair.p.ends[1].status(7) == Status.WAITING)
    for end in pair.p.ends:
        for name in list(end.channel._up):
            end.channel.cut(name, "pulled out")
    for end in pair.p.ends:
        end.send(7, [1] if when == "writing" else [0, 1])
    pair.until(lambda: pair.held() and all(end.channel._up for end in pair.p.ends))
    for end in pair.p.ends:
        end.engine.let_go()
    for end in pair.p.ends:  # so that what is said of the end of the writes is lost as well
        for name in list(end.channel._up):
            end.channel.cut(name, "pulled out again")
    pair.until(lambda: [end.engine.let_go() for end in pair.p.ends] and pair.d.results() and pair.p.results())
    pair.ended(ok=True)


@pytest.mark.parametrize("pair", [HURRY], indirect=True)
def test_a_prefill_rank_that_was_started_again_fails_its_rooms_and_serves_new_ones(pair: Pair) -> None:
    pair.start()
    pair.until(pair.held)
    ports = [end.port for end in pair.p.ends]
    pair.p.close()
    run_until(lambda: pair.d.results() == [(7, 0, False)] and pair.d.released() == [7], pair.d)
    assert "is lost: peer left, and it has ended" in pair.d.errors()[0] or "started again" in pair.d.errors()[0]
    pair.p = Side(PrefillEnd, P2, engine=HeldEngine, **HURRY)
    fill(pair.p)
    assert ports != [end.port for end in pair.p.ends]
    pair.start(8)
    pair.until(pair.held)
    for end in pair.p.ends:
        end.engine.let_go()
    pair.until(lambda: pair.d.results()[-1] == (8, 0, True))


@pytest.mark.parametrize("pair", [HURRY], indirect=True)
def test_a_decode_replica_that_leaves_fails_its_rooms_and_gives_prefill_its_pages_back(pair: Pair) -> None:
    pair.start()
    pair.until(pair.held)
    pair.d.close()
    run_until(lambda: pair.p.results() == [(7, 0, False)] and pair.p.released() == [7], pair.p)
    assert "is lost: peer left, and it has ended" in pair.p.errors()[0]
    assert all(not end.engine.held for end in pair.p.ends)


def test_what_does_not_fit_is_refused_with_both_values(pair: Pair) -> None:
    other = Side(DecodeEnd, Grid(), layout=lambda r: layout_of(KV, Grid(), r, tokens=4), name="coarse", engine=HeldEngine)
    pair.extra.append(other)
    other.ends[0].receive(7, [1], pair.p.source())
    for end in pair.p.ends:
        end.send(7, [1])
    run_until(lambda: bool(other.results() and pair.p.results()), other, pair.p)
    assert "tokens is 4 here and 2 there" in other.errors()[0]
    assert isinstance(next(r.results[0].error for r in other.reports[0] if r.results), UnsupportedOperation)


def test_a_wrong_number_of_pages_is_refused_with_the_numbers(pair: Pair) -> None:
    for end in pair.d.ends:
        end.receive(7, [1, 2, 3], pair.p.source())
    for end in pair.p.ends:
        end.send(7, [0, 1])
    pair.ended(ok=False)
    assert "decode wants 3 pages, of which this rank should hold 3; it was given 2" in pair.d.errors()[0]


def test_a_second_decode_rank_of_the_same_number_is_turned_away(pair: Pair) -> None:
    pair.start()
    pair.until(pair.held)
    thief = Side(DecodeEnd, D2, name="thief", engine=HeldEngine)
    pair.extra.append(thief)
    for end in thief.ends:
        end.receive(7, [5, 6], pair.p.source())
    run_until(lambda: bool(thief.released()), thief, pair.p)
    assert "decode rank 0 of this room is decode/0 already" in thief.errors()[0]
    for end in pair.p.ends:
        end.engine.let_go()
    pair.ended(ok=True)


def test_a_room_that_decode_gave_up_before_prefill_opened_it_fails_at_once(pair: Pair) -> None:
    for end in pair.d.ends:
        end.receive(7, [1], pair.p.source())
    pair.until(lambda: all(end._wants for end in pair.p.ends))
    pair.d.ends[0].abort(7, why="the client left")
    pair.until(lambda: pair.d.released())
    for end in pair.p.ends:
        end.send(7, [1])
    pair.until(lambda: pair.p.released())
    assert "decode/0: the client left" in pair.p.errors()[0]


def test_pages_are_lent_to_one_room_at_decode_and_to_several_at_prefill(pair: Pair) -> None:
    d, p = pair.d.ends[0], pair.p.ends[0]
    d.receive(7, [1, 2], pair.p.source())
    for pages, found in (
        ([2], "page 2 still belongs to room 7"),
        ([3, 3], "page 3 is named twice"),
        ([16], "outside of the pool of 16"),
    ):
        with pytest.raises(CommplaneError, match=found):
            d.receive(8, pages, pair.p.source())
    assert len(d.ledger) == 2 and 8 not in d.table.rooms
    p.send(7, [1, 2])
    p.send(8, [2, 3])
    with pytest.raises(CommplaneError, match="not all in the pool"):
        p.send(9, [-1])
    with pytest.raises(CommplaneError, match="given its last page already"):
        p.send(8, [4])
    assert 9 not in p.table.rooms


def test_more_rooms_than_the_table_has_places_all_end(pair: Pair) -> None:
    n = CAPACITY + 40
    for room in range(n):
        for end in pair.d.ends:
            end.receive(room, [], pair.p.source())
        for end in pair.p.ends:
            end.send(room, [])
    pair.until(lambda: len(pair.d.results()) == n == len(pair.p.results()), deadline=30)
    assert all(ok for _, _, ok in pair.d.results())


def test_many_failures_at_once_are_all_told_in_full(pair: Pair) -> None:
    n = 5 * LANES
    for room in range(n):
        for end in pair.d.ends:
            end.receive(room, [], pair.p.source(), timeout=30)
    for _ in range(3):
        pair.d.step()
    for room in range(n):
        pair.d.ends[room % 2].abort(room, why=f"client {room} left")
    pair.until(lambda: len(pair.d.results(1)) == n)
    assert all(f"decode/{room % 2}: client {room} left" in text for room, text in enumerate(pair.d.errors(1)))


def test_rounds_may_be_pipelined_and_shared_by_an_engine_that_has_one_of_its_own() -> None:
    p = Side(PrefillEnd, engine=HeldEngine)
    d = Side(DecodeEnd, engine=HeldEngine)
    try:
        d.ends[0].receive(7, [1], p.source())
        p.ends[0].send(7, [1])
        shared = {side: SimulatedRounds(1, [ROOMS])[0] for side in (p, d)}
        for side, votes in shared.items():
            votes.issue(side.ends[0].votes(), digest=side.ends[0].table.digest)
        done = []
        until = time.monotonic() + 10
        while len(done) < 2 and time.monotonic() < until:
            for side, votes in shared.items():
                report = side.ends[0].settle(votes.result())  # of the round of the step before
                done += report.results
                votes.issue(side.ends[0].votes(), digest=side.ends[0].table.digest)
            p.ends[0].engine.let_go()
        assert [r.ok for r in done] == [True, True]
    finally:
        p.close()
        d.close()


def test_an_end_says_what_is_wrong_with_its_own_arguments() -> None:
    layout = layout_of(KV, P2, 0)

    def make(**other: Any) -> PrefillEnd:
        common: dict[str, Any] = {"name": "p", "kv": KV, "grid": P2, "rank": 0, "layout": layout, "engine": HeldEngine()}
        return PrefillEnd(**{**common, "engine_name": "held", "token": None, **other})

    with pytest.raises(ConfigError, match=r"its layout holds heads \(0, 2\), the grid gives it \(2, 4\)"):
        make(rank=1)
    with pytest.raises(CommplaneError, match="is not open"):
        make().step()
    end = make()
    with pytest.raises(UnsupportedOperation, match="the pool has 10"):
        end.open(memoryview(bytearray(10)))
    end = make()
    end.open()
    with end, pytest.raises(UnsupportedOperation, match="a replica of 2 ranks wants rounds="):
        end.step()
    with pytest.raises(ConfigError, match="overlap"):
        KvLayout(pages=2, layers=(0, 1), heads=(0, 2), tokens=2, row=8, strides=(0, 32, 64, 8, 8))
    with pytest.raises(ConfigError, match=r"ranks \[1\] have none"):
        PrefillReplica(P2, {0: Address("p", "h", 1)})


def test_metrics_show_rooms_pages_and_what_is_quarantined(pair: Pair) -> None:
    pair.start()
    pair.until(pair.held)
    registry = CollectorRegistry()
    other = CollectorRegistry()
    registry.register(EndCollector(pair.p.ends[0]))
    other.register(EndCollector(pair.d.ends[0]))
    text = (generate_latest(registry) + generate_latest(other)).decode()
    assert 'commplane_disagg_rooms{end="decode/0"} 1.0' in text
    assert 'commplane_disagg_pages_lent{end="prefill/0"} 2.0' in text
    assert 'commplane_disagg_pages_quarantined{end="decode/0"} 0.0' in text
    assert 'commplane_disagg_rooms_failed_total{end="decode/0"} 0.0' in text


ROOM_NUMBERS = st.integers(0, 9)
SAID = st.one_of(
    st.builds(m.Want, ROOM_NUMBERS, st.integers(0, 2), st.integers(0, 2**40), st.lists(st.integers(0, 2**40), max_size=4)),
    st.builds(m.Ack, ROOM_NUMBERS, st.integers(0, 2)),
    st.builds(m.Abort, ROOM_NUMBERS, st.integers(0, 2), st.integers(0, 99), st.just("x"), st.text(max_size=9)),
    st.builds(m.Inquire, st.integers(0, 9), st.integers(0, 9)),
    st.builds(m.Ended, st.integers(0, 9), st.integers(0, 9)),
    st.builds(m.Written, ROOM_NUMBERS, st.integers(0, 2)),
    st.builds(m.Drained, ROOM_NUMBERS, st.integers(0, 2), st.booleans()),
)


@given(
    said=st.lists(SAID, max_size=12),
    rank=st.integers(0, 1),
    grid=st.sampled_from([Grid(tp=2), Grid(tp=4), Grid(tp=2, pp=2)]),
    card=st.one_of(st.none(), st.binary(max_size=40)),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_peer_says_the_rooms_of_others_go_on(
    pair: Pair, said: list[m.Message], rank: int, grid: Grid, card: bytes | None
) -> None:
    """Room 0 is between `pair`'s ends; the rogue knows the token, has another name, and a card of its own or no readable one."""
    generation = len(pair.p.results())
    pair.start(0, generation=generation)
    pair.until(pair.held)
    rogue_layout = layout_of(KV, grid, rank)
    body = (
        encode_card(Card(side="decode", kv=KV, grid=grid, rank=rank, layout=rogue_layout, engine="shm")) if card is None else card
    )
    rogue = Channel("rogue", token=TOKEN, card=body)
    try:
        rogue.dial("prefill/0", "127.0.0.1", pair.p.ends[0].port)
        pair.until(lambda: rogue.poll() or rogue.is_up("prefill/0"))
        for message in said:
            rogue.send("prefill/0", message)
        for _ in range(8):
            rogue.poll()
            pair.p.step()
    finally:
        rogue.close()
    for end in pair.p.ends:
        end.engine.let_go()
    pair.until(lambda: len(pair.d.results()) == generation + 1 and len(pair.p.results()) >= generation + 1)
    assert pair.d.results()[-1] == (0, generation, True)
