"""What goes wrong with one room, one peer or one message costs the other rooms nothing, and both sides tell the same of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from disagg_held import HeldEngine
from disagg_sides import KV, ONE, Side, fill, layout_of, run_until
from disagg_world import World

from commplane.errors import CommplaneError, ConfigError, PeerError
from commplane_disagg.channel.messages import Ack, Message
from commplane_disagg.ends import Address, DecodeEnd, PrefillEnd, PrefillReplica
from commplane_disagg.ranks import Grid
from commplane_disagg.rooms import CAPACITY, Status

pytestmark = pytest.mark.timeout(60)

Make = Callable[..., Side]


@pytest.fixture
def side() -> Iterator[Make]:
    made: list[Side] = []

    def make(kind: Any, grid: Grid = ONE, **settings: Any) -> Side:
        made.append(Side(kind, grid, **settings))
        if kind is PrefillEnd:
            fill(made[-1])
        return made[-1]

    yield make
    for one in made:
        one.close()


class Clock:
    """Real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


def step(*sides: Side, times: int = 30) -> None:
    for _ in range(times):
        for one in sides:
            one.step()
        time.sleep(0.001)


def loses_first(end: Any, kind: type[Message]) -> list[Message]:
    """The first message of this kind is lost with its connection, after the end took it for sent."""
    send, lost = end.channel.send, []

    def sends(name: str, message: Message) -> bool:
        if isinstance(message, kind) and not lost:
            lost.append(message)
            end.channel._up[name].close("the cable was pulled out")
            return True
        return bool(send(name, message))

    end.channel.send = sends
    return lost


def test_rooms_of_a_stopped_prefill_do_not_hold_up_those_of_a_healthy_one(side: Make) -> None:
    stopped, good = side(PrefillEnd, name="stopped"), side(PrefillEnd, name="good")
    clock = Clock()
    d = side(
        DecodeEnd,
        layout=lambda r: layout_of(KV, ONE, r, pages=300),
        timeout=20.0,
        drain_timeout=1000.0,
        clock=clock,
        silence=1000.0,
    )
    for room in range(CAPACITY + 40):
        d.ends[0].receive(room, [room], stopped.source())
    run_until(lambda: len(stopped.ends[0]._wants) == CAPACITY + 40, stopped, d)  # from here on it is not driven any more
    d.ends[0].receive(1000, [299], good.source(), timeout=40.0)
    good.ends[0].send(1000, [1])
    run_until(lambda: d.ends[0].table.rooms[1000].local is Status.SUCCESS, good, d)
    assert d.ends[0].status(1000) is Status.NEW, "the table was full"
    clock.ahead += 21.0
    run_until(lambda: (1000, 0, True) in d.results() and good.results() == [(1000, 0, True)], good, d)
    assert d.released() == [1000]
    run_until(lambda: len(d.results()) == CAPACITY + 41, good, d)
    assert all("nothing was said of the end of the writes of stopped/0" in text for text in d.errors())
    run_until(lambda: len(stopped.ends[0]._wants) == 0 and len(d.released()) == CAPACITY + 41, stopped, d)


def test_a_room_that_is_complete_on_a_rank_does_not_pass_its_deadline_there(side: Make) -> None:
    clock = Clock()
    p = side(PrefillEnd, Grid(tp=2), engine=HeldEngine, timeout=500.0)
    d = side(DecodeEnd, Grid(tp=2), engine=HeldEngine, timeout=500.0)
    one = d.ends[0]
    one._clock = clock
    one.receive(7, [1], p.source(), timeout=20.0)
    d.ends[1].receive(7, [1], p.source())
    for end in p.ends:
        end.send(7, [2])
    run_until(lambda: all(end.engine.held for end in p.ends), p, d)
    p.ends[0].engine.let_go()
    run_until(lambda: one.table.rooms[7].local is Status.SUCCESS, p, d)
    clock.ahead += 21.0
    for _ in range(5):
        d.step()
    assert d.results() == []
    p.ends[1].engine.let_go()
    run_until(lambda: bool(d.results() and p.results()), p, d)
    assert d.results() == d.results(1) == p.results() == [(7, 0, True)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_acknowledgement_that_was_lost_is_asked_for_again(side: Make, ranks: int) -> None:
    p, d = side(PrefillEnd, Grid(tp=ranks)), side(DecodeEnd, Grid(tp=ranks))
    lost = loses_first(d.ends[0], Ack)
    for end in d.ends:
        end.receive(7, [0, 1], p.source())
    for end in p.ends:
        end.send(7, [2, 3])
    run_until(lambda: bool(p.results() and d.results()), p, d)
    assert len(lost) == 1
    assert p.results() == d.results() == [(7, 0, True)]


def test_a_rank_that_has_everything_asks_for_nothing_after_a_reconnect(side: Make) -> None:
    """Prefill has ended the room then, and would have to refuse who asks."""
    p, d = side(PrefillEnd, Grid(tp=2)), side(DecodeEnd, Grid(tp=2))
    for end in d.ends:
        end.receive(7, [0], p.source())
    for end in p.ends:
        end.send(7, [2])
    until = time.monotonic() + 10
    while p.results() == []:
        assert time.monotonic() < until
        p.step()
        for end in d.ends:  # they hear and say everything, and do not come to agree
            end.votes()
    for end in d.ends:
        for name in end._dialled:
            end.channel.cut(name, "pulled out")
        end.votes()
        assert not any(end.channel.is_up(name) for name in end._dialled)
    until = time.monotonic() + 10
    while not all(end.channel.is_up(name) for end in d.ends for name in end._dialled):
        assert time.monotonic() < until
        p.step()
        for end in d.ends:
            end.votes()
    step(p, d)
    assert d.results() == p.results() == [(7, 0, True)]


def test_who_has_everything_of_a_room_that_failed_meanwhile_hears_of_that_after_a_reconnect(side: Make) -> None:
    p, d = side(PrefillEnd), side(DecodeEnd)
    end = d.ends[0]
    assert not loses_first(end, Ack)
    end.receive(7, [0], p.source())
    p.ends[0].send(7, [2])
    until = time.monotonic() + 10
    while end.table.rooms[7].local is not Status.SUCCESS:  # its ranks do not come to agree
        assert time.monotonic() < until
        p.step()
        end.votes()
    p.ends[0].abort(7, why="the client left")
    run_until(lambda: p.released() == [7], p)
    while not end.table.rooms[7].is_failing:
        assert time.monotonic() < until
        p.step()
        end.votes()
    run_until(lambda: d.released() == [7], p, d)
    assert p.results() == d.results() == [(7, 0, False)]
    assert "prefill/0: the client left" in d.errors()[0]


def test_what_prefill_said_of_a_failed_room_is_said_again_to_who_had_everything_of_one_rank(side: Make) -> None:
    p, d = side(PrefillEnd, Grid(tp=2), engine=HeldEngine), side(DecodeEnd, engine=HeldEngine)
    d.ends[0].receive(7, [1], p.source())
    for end in p.ends:
        end.send(7, [2])
    run_until(lambda: all(end.engine.held for end in p.ends), p, d)
    p.ends[0].engine.let_go()
    run_until(lambda: d.ends[0].table.rooms[7].data.senders["prefill/0"].written, p, d)
    p.ends[1].engine.fail("the cable is cut")
    run_until(lambda: bool(d.released() and p.released()), p, d)
    assert p.results() == d.results() == [(7, 0, False)]
    assert "the cable is cut" in d.errors()[0]


def test_ranks_of_a_replica_must_have_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match=r"ranks \[0, 2\] are all named 'same'; give each end a name of its own"):
        PrefillReplica(Grid(tp=3), {0: Address("same", "h", 1), 1: Address("other", "h", 2), 2: Address("same", "h", 3)})


@pytest.mark.parametrize("number", [-1, 1 << 63])
@pytest.mark.parametrize("which", ["room", "generation"])
def test_numbers_that_the_wire_does_not_carry_are_refused_before_anybody_is_told(side: Make, which: str, number: int) -> None:
    p, d = side(PrefillEnd), side(DecodeEnd)
    room, generation = (number, 0) if which == "room" else (7, number)
    with pytest.raises(CommplaneError, match=f"{which} .* wanted 0 to"):
        d.ends[0].receive(room, [0], p.source(), generation=generation)
    with pytest.raises(CommplaneError, match=f"{which} .* wanted 0 to"):
        p.ends[0].send(room, [0], generation=generation)
    assert len(d.ends[0].ledger) == len(p.ends[0].ledger) == 0
    most = {"room": ((1 << 63) - 1, 0), "generation": (7, time.time_ns() // 1000)}[which]
    d.ends[0].receive(most[0], [0], p.source(), generation=most[1])
    p.ends[0].send(most[0], [0], generation=most[1])
    run_until(lambda: bool(p.results() and d.results()), p, d)
    assert p.results() == d.results() == [(*most, True)]


def test_a_strangers_early_abort_does_not_end_the_room_of_another_replica(side: Make) -> None:
    p, mine, stranger = side(PrefillEnd), side(DecodeEnd, name="mine"), side(DecodeEnd, name="stranger")
    for d in (mine, stranger):
        d.ends[0].receive(7, [0], p.source())
    run_until(lambda: [len(wants) for wants in p.ends[0]._wants.values()] == [2], p, mine, stranger)
    stranger.ends[0].abort(7, why="the stranger gives up")
    run_until(lambda: bool(stranger.released()), p, mine, stranger)
    p.ends[0].send(7, [1])
    run_until(lambda: bool(mine.results() and p.results()), p, mine, stranger)
    assert mine.results() == p.results() == [(7, 0, True)]


def test_who_gave_a_room_up_before_it_was_opened_is_turned_away_and_another_is_not(side: Make) -> None:
    p, stranger = side(PrefillEnd), side(DecodeEnd, name="stranger")
    stranger.ends[0].receive(7, [0], p.source())
    run_until(lambda: bool(p.ends[0]._wants), p, stranger)
    stranger.ends[0].abort(7, why="the stranger gives up")
    run_until(lambda: bool(stranger.released()), p, stranger)
    mine = side(DecodeEnd, name="mine")
    mine.ends[0].receive(7, [0], p.source())
    run_until(lambda: bool(p.ends[0]._wants), p, mine)
    p.ends[0].send(7, [1])
    run_until(lambda: bool(mine.results() and p.results()), p, mine)
    assert mine.results() == p.results() == [(7, 0, True)]


def test_an_abort_between_votes_and_settle_does_not_part_the_two_sides(side: Make) -> None:
    p, d = side(PrefillEnd), side(DecodeEnd)
    end, rounds = d.ends[0], d.rounds[0]
    end.receive(7, [0, 1], p.source())
    p.ends[0].send(7, [2, 3])
    until, aborted = time.monotonic() + 10, False
    while not d.results():
        assert time.monotonic() < until
        if not aborted:
            p.step()
        rounds.issue(end.votes(), digest=end.table.digest)
        if end.table.rooms[7].local is Status.SUCCESS and not aborted:
            aborted = True
            end.abort(7, why="the client left")  # too late: success was voted for
        d.reports[0].append(end.settle(rounds.result()))
    run_until(lambda: bool(p.results()), p, d)
    assert aborted and d.results() == p.results() == [(7, 0, True)]


def test_a_room_that_was_opened_on_one_rank_only_ends_the_steps_of_that_rank_with_an_error(side: Make) -> None:
    clock = Clock()
    p, d = side(PrefillEnd), side(DecodeEnd, Grid(tp=2), timeout=30.0, lost_after=40.0, clock=clock, silence=1000.0)
    d.ends[0].receive(7, [0], p.source())
    step(p, d)
    clock.ahead += 60.0
    step(p, d)
    assert d.results() == []
    clock.ahead += 20.0
    with pytest.raises(PeerError, match="room 7 generation 0 is open on this rank, and not on all ranks of the replica"):
        d.step()


class Stopped(HeldEngine):
    """Some of its peers do not answer, and it takes five seconds to find out."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def connect(self, peer: str, metadata: bytes) -> None:
        super().connect(peer, metadata)
        if peer.startswith("bad"):
            self.clock.ahead += 5.0
            raise PeerError(f"peer {peer!r} cannot be reached: timed out")


def test_a_peer_that_cannot_be_connected_to_is_tried_once_in_a_while_and_not_for_each_of_its_rooms(side: Make) -> None:
    clock = Clock()
    p = side(PrefillEnd, engine=lambda: Stopped(clock), clock=clock, silence=1000.0)
    bad, good = side(DecodeEnd, name="bad", engine=HeldEngine), side(DecodeEnd, name="good", engine=HeldEngine)
    for room in range(5):
        bad.ends[0].receive(room, [room], p.source())
    good.ends[0].receive(100, [0], p.source())
    run_until(lambda: len(p.ends[0]._wants) == 6, p, bad, good)
    tries = p.ends[0].engine.calls
    for room in range(4):
        p.ends[0].send(room, [room])
    p.ends[0].send(100, [9])
    assert tries.count("connect bad/0") == 1
    run_until(lambda: len(p.errors()) == 4 and bool(p.ends[0].engine.held), p, bad, good)
    assert all("to bad/0: peer 'bad/0' cannot be reached: timed out" in text for text in p.errors())
    p.ends[0].engine.let_go()
    run_until(lambda: good.results() == [(100, 0, True)], p, bad, good)
    clock.ahead += 21.0
    p.ends[0].send(4, [4])
    assert tries.count("connect bad/0") == 2


def test_what_came_while_the_scheduler_was_busy_is_heard_before_a_deadline_is_looked_at(side: Make) -> None:
    clock = Clock()
    p, d = side(PrefillEnd, Grid(tp=2)), side(DecodeEnd, clock=clock)
    d.ends[0].receive(7, [0], p.source(), timeout=20.0)
    run_until(lambda: all(end._wants for end in p.ends), p, d)
    for end in p.ends:
        end.send(7, [1])
    run_until(lambda: all(end.table.rooms[7].data.receivers[0].written for end in p.ends), p)
    clock.ahead += 21.0
    run_until(lambda: bool(d.results() and p.results()), d, p)
    assert d.results() == p.results() == [(7, 0, True)]


def test_lost_messages_alone_fail_no_room_whatever_their_kind() -> None:
    """Connections break all the time, what is on its way is lost, and the table has fewer places than there are rooms."""
    for seed in range(6):
        world = World(seed, [Grid(tp=2)], [Grid(), Grid(tp=2)], faults=0.0, places=3)
        for end in [end for replica in (*world.prefill, *world.decode) for end in replica.ends]:
            end._timeout, end._lost_after = 10000.0, 10000.0
        for _ in range(300):
            if world.random.random() < 0.3:
                world.request()
            if world.random.random() < 0.1:
                replica = world.random.choice((*world.prefill, *world.decode))
                world.cut(world.random.choice(replica.ends))
            world.step()
        world.settle_down()
        assert world.counts["broken"] > 20 and world.counts["success"] > 20, world.counts
        assert all(set(r.ends.values()) == {True} for r in world.requests)


def test_both_sides_tell_the_same_of_rooms_that_decode_gives_up_at_any_moment() -> None:
    """Nothing is lost here, and what was given up while its success was agreed on counts as done on both sides."""
    seen = set()
    for seed in range(6):
        world = World(seed, [Grid(tp=2)], [Grid()], faults=0.0)
        world.decode[0].hasty = 0.02
        for end in [end for replica in (*world.prefill, *world.decode) for end in replica.ends]:
            end._timeout = 10000.0
        world.play(300, trouble=0.0)
        world.decode[0].hasty = 0.0
        world.settle_down()
        for request in world.requests:
            ends = request.ends["p0"], request.ends["d0"]
            seen.add(ends)
            assert ends != (False, True), "decode goes on with a room that failed on prefill"
    assert (True, True) in seen and (False, False) in seen


def test_a_table_full_of_rooms_that_fail_lets_others_through() -> None:
    for seed in range(6):
        world = World(seed, [Grid(tp=2), Grid()], [Grid(), Grid(tp=2)], quiet=bool(seed % 2), places=2)
        world.play(300, trouble=0.06)
        world.settle_down()
        assert world.counts["failed"] and world.counts["landed"], world.counts
