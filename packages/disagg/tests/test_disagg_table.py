"""The table alone, on a clock of the test's: who holds a row, when a group is ready, what the feed tells."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from commplane_disagg.registry.dp_ranks import DpRankTable
from commplane_disagg.registry.feed import Feed
from commplane_disagg.registry.refusals import (
    Claimed,
    Full,
    OutOfGrid,
    Refusal,
    RoomConflict,
    Stale,
    TopologyConflict,
    UnknownRow,
)
from commplane_disagg.registry.table import Table
from commplane_disagg.wire import Change, Coordinate, DpRank, EngineOffer, Row, Tenure, Topology

pytestmark = pytest.mark.timeout(60)

LEASE = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def topology(**changed: Any) -> Topology:
    return Topology(**{"tp": 2, "page_size": 16, "kv_dtype": "bfloat16", "layers": 4, "kv_heads": 2, "head_dim": 8, **changed})


def row(tp: int = 0, instance: str = "a", epoch: int = 0, **changed: Any) -> Row:
    return Row(
        **{"key": Coordinate(tp=tp), "host": "10.0.0.1", "port": 7000 + tp, "instance": instance, "epoch": epoch, **changed}
    )


def tenure(found: Row) -> Tenure:
    return Tenure(key=found.key, instance=found.instance, epoch=found.epoch)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> Table:
    return Table(clock, LEASE)


def kinds(table: Table, since: int = 0) -> list[tuple[str, str]]:
    reset, changes = table.feed.since(since)
    assert not reset
    return [(change.kind, change.instance) for change in changes]


def test_a_group_is_ready_when_its_keys_are_the_declared_grid_and_not_when_enough_requests_came(table: Table) -> None:
    for _ in range(5):
        table.register(topology(), row(0))
    assert not table.ready
    assert table.missing() == ((Coordinate(tp=1),), 1)
    table.register(topology(), row(1))
    assert table.ready
    assert table.missing() == ((), 0)
    assert [change.kind for change in table.feed.since(0)[1]] == ["registered", "registered"]


def test_missing_places_are_counted_all_and_named_up_to_a_limit(table: Table) -> None:
    table.register(topology(dp=4, cp=2, tp=8, pp=2), row(0))
    first, count = table.missing(limit=3)
    assert count == 4 * 2 * 8 * 2 - 1
    assert first == (Coordinate(0, 0, 0, 1), Coordinate(0, 0, 1, 0), Coordinate(0, 0, 1, 1))


def test_a_key_outside_of_the_grid_is_refused(table: Table) -> None:
    with pytest.raises(OutOfGrid, match=r"row dp0/cp0/tp2/pp0 is not in the grid that it declares: dp 1, cp 1, tp 2, pp 1"):
        table.register(topology(), row(2))
    assert table.topology is None


def test_another_topology_is_refused_with_the_difference(table: Table) -> None:
    table.register(topology(), row(0))
    with pytest.raises(TopologyConflict, match=r"page_size 16 != 32, kv_dtype 'bfloat16' != 'float16'") as caught:
        table.register(topology(page_size=32, kv_dtype="float16"), row(1))
    assert caught.value.status == 409
    assert caught.value.problem.difference == {"page_size": ("16", "32"), "kv_dtype": ("'bfloat16'", "'float16'")}
    assert caught.value.problem.retry_after is None
    assert len(table.held) == 1


def test_ranks_restarted_with_another_topology_wait_for_the_leases_of_the_old_ones(table: Table, clock: Clock) -> None:
    table.register(topology(), row(0))
    clock.now += 4
    with pytest.raises(TopologyConflict) as caught:
        table.register(topology(tp=4), row(0, "b", epoch=1))
    assert caught.value.problem.retry_after == pytest.approx(6)
    clock.now += 6
    table.register(topology(tp=4), row(0, "b", epoch=1))
    assert table.topology == topology(tp=4)


def test_a_lease_ends_unless_it_is_renewed(table: Table, clock: Clock) -> None:
    table.register(topology(), row(0))
    table.register(topology(), row(1))
    clock.now += 6
    table.renew(tenure(row(0)))
    assert table.next_expiry() == pytest.approx(4)
    clock.now += 6
    assert table.expire() == 1
    assert list(table.held) == [Coordinate(tp=0)]
    assert not table.ready
    assert kinds(table, 2) == [("expired", "a")]
    with pytest.raises(UnknownRow, match=r"there is no row dp0/cp0/tp1/pp0: .* register again"):
        table.renew(tenure(row(1)))


def test_a_renewal_that_comes_after_the_end_of_the_lease_finds_no_row(table: Table, clock: Clock) -> None:
    table.register(topology(), row(0))
    clock.now += LEASE
    with pytest.raises(UnknownRow):
        table.renew(tenure(row(0)))


def test_a_higher_epoch_takes_the_row_over_and_the_old_instance_is_refused_from_then_on(table: Table, clock: Clock) -> None:
    table.register(topology(), row(0, "old"))
    assert table.register(topology(), row(0, "new", epoch=1, port=9)) == "replaced"
    change = table.feed.since(1)[1][0]
    assert (change.kind, change.instance, change.previous, change.row) == ("replaced", "new", "old", row(0, "new", 1, port=9))
    for late in (
        lambda: table.register(topology(), row(0, "old")),
        lambda: table.renew(tenure(row(0, "old"))),
        lambda: table.withdraw(tenure(row(0, "old"))),
    ):
        with pytest.raises(Stale, match="instance old epoch 0"):
            late()
    clock.now += LEASE  # also when the new one is gone
    table.expire()
    with pytest.raises(Stale, match="was replaced or has withdrawn"):
        table.register(topology(), row(0, "old"))


def test_two_instances_cannot_hold_one_row_and_the_second_waits_for_the_lease_of_the_first(table: Table, clock: Clock) -> None:
    table.register(topology(), row(0, "first"))
    clock.now += 3
    with pytest.raises(
        Claimed, match=r"held by instance first epoch 0 at 10.0.0.1:7000 for 7.0 s more, and claimed by"
    ) as caught:
        table.register(topology(), row(0, "second"))
    assert caught.value.problem.retry_after == pytest.approx(7)
    table.renew(tenure(row(0, "first")))
    clock.now += LEASE
    assert table.register(topology(), row(0, "second")) == "registered"
    with pytest.raises(Stale):  # woken after its lease had ended and its row was taken
        table.renew(tenure(row(0, "first")))
    with pytest.raises(Stale):
        table.register(topology(), row(0, "first"))


def test_an_instance_that_was_only_silent_gets_its_row_back_if_nobody_took_it(table: Table, clock: Clock) -> None:
    table.register(topology(), row(0))
    clock.now += LEASE + 1
    assert table.register(topology(), row(0)) == "registered"
    assert kinds(table) == [("registered", "a"), ("expired", "a"), ("registered", "a")]


def test_a_lower_epoch_is_refused_while_the_higher_one_lives(table: Table) -> None:
    table.register(topology(), row(0, "new", epoch=2))
    with pytest.raises(Stale, match="is held by instance new epoch 2"):
        table.register(topology(), row(0, "old", epoch=1))
    with pytest.raises(Stale, match="is held by instance new epoch 2"):
        table.renew(tenure(row(0, "old", epoch=1)))


def test_a_withdrawn_row_is_gone_and_a_registration_that_was_still_on_its_way_does_not_bring_it_back(table: Table) -> None:
    table.register(topology(), row(0))
    table.withdraw(tenure(row(0)))
    assert table.topology is None
    with pytest.raises(Stale):
        table.register(topology(), row(0))
    with pytest.raises(Stale):
        table.withdraw(tenure(row(0)))
    assert table.register(topology(tp=8), row(0, epoch=1)) == "registered"


def test_one_instance_cannot_change_its_row_without_a_higher_epoch(table: Table) -> None:
    table.register(topology(), row(0))
    changed = row(0, port=1, engines=(EngineOffer("tcp", b"x"),))
    with pytest.raises(Claimed, match="registered it with another port and engines before") as caught:
        table.register(topology(), changed)
    assert caught.value.problem.difference["port"] == ("7000", "1")
    assert caught.value.problem.retry_after is None
    assert table.register(topology(), msgspec.structs.replace(changed, epoch=1)) == "replaced"


def test_the_feed_tells_what_is_kept_and_says_where_something_is_lost() -> None:
    feed = Feed(keep=3)
    for number in range(1, 6):
        feed.add(Change(sequence=number, kind="registered", key=Coordinate(), instance="a", epoch=0))
    assert [change.sequence for change in feed.since(2)[1]] == [3, 4, 5]
    assert feed.since(5) == (False, ())
    assert feed.since(1) == (True, ())
    assert feed.since(6) == (True, ())
    with pytest.raises(ValueError, match="wants change 6, found 9"):
        feed.add(Change(sequence=9, kind="registered", key=Coordinate(), instance="a", epoch=0))


sizes = st.integers(1, 3)


@settings(max_examples=150, deadline=None)
@given(st.data(), sizes, sizes, sizes, sizes, st.randoms(use_true_random=False))
def test_retried_duplicated_and_reordered_registrations_never_make_a_group_ready_early(
    data: st.DataObject, dp: int, cp: int, tp: int, pp: int, chance: random.Random
) -> None:
    grid = topology(dp=dp, cp=cp, tp=tp, pp=pp)
    places = list(grid.places())
    copies = data.draw(st.lists(st.integers(1, 4), min_size=len(places), max_size=len(places)))
    sent = [place for place, count in zip(places, copies, strict=True) for _ in range(count)]
    chance.shuffle(sent)
    table, arrived = Table(Clock(), LEASE), set()
    for place in sent:
        table.register(grid, row(key=place))
        arrived.add(place)
        assert table.ready == (arrived == set(places))
        assert table.missing()[1] == len(places) - len(arrived)
    assert table.feed.sequence == len(places)


class Ranks(RuleBasedStateMachine):
    """Ranks that come, die, sleep, wake and are started anew, and messages of theirs that arrive twice, late or never.

    What must hold is told by a model: for each place, who may be its holder.
    """

    @initialize(tp=st.integers(1, 3), dp=st.integers(1, 2))
    def declare(self, tp: int, dp: int) -> None:
        self.clock, self.grid = Clock(), topology(tp=tp, dp=dp)
        self.table = Table(self.clock, LEASE, keep=100000)
        self.places = list(self.grid.places())
        self.sent: list[Row] = []
        self.gone: set[tuple[Coordinate, str, int]] = set()  # replaced or withdrawn
        self.holders: dict[Coordinate, tuple[str, int]] = {}
        self.last: dict[Coordinate, tuple[str, int]] = {}
        self.seen = 0
        self.count = 0

    @rule(data=st.data(), restarted=st.booleans())
    def a_process_starts_and_registers(self, data: st.DataObject, restarted: bool) -> None:
        key = data.draw(st.sampled_from(self.places))
        epochs = [found.epoch for found in self.sent if found.key == key]
        self.count += 1
        found = row(key=key, instance=f"i{self.count}", epoch=max(epochs, default=0) + restarted)
        self.sent.append(found)
        self.arrives(found)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def a_registration_arrives_again(self, data: st.DataObject) -> None:
        self.arrives(data.draw(st.sampled_from(self.sent)))

    def arrives(self, found: Row) -> None:
        try:
            outcome = self.table.register(self.grid, found)
        except Refusal as refusal:
            self.follow()
            mine = (found.key, found.instance, found.epoch)
            held = self.holders.get(found.key)
            assert mine in self.gone or (held is not None and held != mine[1:] and held[1] >= found.epoch), refusal  # noqa: PT017  either outcome is legal, each under its condition
            return
        self.follow()
        assert (found.key, found.instance, found.epoch) not in self.gone, "a replaced instance came back"
        assert self.holders[found.key] == (found.instance, found.epoch)
        assert outcome in ("registered", "renewed", "replaced")

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def a_renewal_arrives(self, data: st.DataObject) -> None:
        found = data.draw(st.sampled_from(self.sent))
        try:
            self.table.renew(tenure(found))
        except Refusal:
            self.follow()
            assert self.holders.get(found.key) != (found.instance, found.epoch)
        else:
            self.follow()
            assert self.holders[found.key] == (found.instance, found.epoch)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def a_withdrawal_arrives(self, data: st.DataObject) -> None:
        found = data.draw(st.sampled_from(self.sent))
        try:
            self.table.withdraw(tenure(found))
        except Refusal:
            self.follow()
            assert self.holders.get(found.key) != (found.instance, found.epoch)
            self.gone.add((found.key, found.instance, found.epoch))  # who wants to leave does not come back either way
        else:
            self.follow()
            assert found.key not in self.holders

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.clock.now += seconds
        self.table.expire()
        self.follow()

    def follow(self) -> None:
        """Play the feed on the model: it alone has to be enough to know the table."""
        reset, changes = self.table.feed.since(self.seen)
        assert not reset
        for change in changes:
            assert change.sequence == self.seen + 1
            self.seen = change.sequence
            who = (change.instance, change.epoch)
            before = self.holders.get(change.key)
            if change.kind == "registered":
                assert before is None
                last = self.last.pop(change.key, None)
                if last not in (None, who):
                    self.gone.add((change.key, *last))
                self.holders[change.key] = who
            elif change.kind == "replaced":
                assert before is not None and before[0] == change.previous and before[1] < change.epoch
                self.gone.add((change.key, *before))
                self.holders[change.key] = who
            else:
                assert before == who
                del self.holders[change.key]
                if change.kind == "withdrawn":
                    self.gone.add((change.key, *who))
                else:
                    self.last[change.key] = who

    @invariant()
    def the_feed_is_the_table_and_ready_is_the_whole_grid(self) -> None:
        if not hasattr(self, "table"):
            return
        self.follow()
        held = {key: (found.row.instance, found.row.epoch) for key, found in self.table.held.items()}
        assert held == self.holders
        assert self.table.ready == (set(held) == set(self.places))
        assert (self.table.topology is None) == (not held)
        ends = [found.until for found in self.table.held.values()]
        assert ends == sorted(ends), "expire looks at the first only"


TestRanks = Ranks.TestCase
TestRanks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_room_is_known_until_its_time_is_over_and_saying_it_again_keeps_it(clock: Clock) -> None:
    rooms = DpRankTable(clock, lifetime=120)
    rooms.register([DpRank(room=1, dp=0), DpRank(room=2, dp=1)])
    clock.now += 100
    rooms.register([DpRank(room=1, dp=0)])
    clock.now += 100
    assert rooms.query([1, 2, 3]) == (DpRank(room=1, dp=0),)
    assert len(rooms) == 1


def test_a_room_belongs_to_one_dp_rank_until_a_higher_generation_moves_it(clock: Clock) -> None:
    rooms = DpRankTable(clock)
    rooms.register([DpRank(room=1, dp=0, generation=1)])
    with pytest.raises(RoomConflict, match="room 1 generation 1 is served by dp rank 0, and claimed by dp rank 3"):
        rooms.register([DpRank(room=7, dp=2), DpRank(room=1, dp=3, generation=1)])
    assert rooms.query([7]) == (), "none of a refused request is stored"
    rooms.register([DpRank(room=1, dp=3, generation=2)])
    rooms.register([DpRank(room=1, dp=0, generation=1)])  # late
    assert rooms.query([1]) == (DpRank(room=1, dp=3, generation=2),)


def test_rooms_are_bounded(clock: Clock) -> None:
    rooms = DpRankTable(clock, limit=2)
    rooms.register([DpRank(room=1, dp=0), DpRank(room=2, dp=0)])
    rooms.register([DpRank(room=2, dp=0)])
    with pytest.raises(Full, match="holds 2 rooms at most"):
        rooms.register([DpRank(room=3, dp=0)])
    clock.now += 121
    rooms.register([DpRank(room=3, dp=0)])
