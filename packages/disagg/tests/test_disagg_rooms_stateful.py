"""Any order of requests, aborts, breaks, stops and deaths that hypothesis can think of."""

from __future__ import annotations

import pytest
from disagg_world import World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from commplane_disagg.ranks import Grid
from commplane_disagg.rooms import CAPACITY

GRIDS = [Grid(), Grid(tp=2)]


class Rooms(RuleBasedStateMachine):
    """What must hold is checked by the world itself.

    No page is lent twice, no byte lands in a page of another room, all ranks see the same in the same step; in the end every room
    has ended and every page has come back that can.
    """

    @initialize(
        seed=st.integers(0, 2**16),
        prefill=st.sampled_from(GRIDS),
        decode=st.sampled_from(GRIDS),
        quiet=st.booleans(),
        places=st.sampled_from([1, 2, CAPACITY]),
    )
    def start(self, seed: int, prefill: Grid, decode: Grid, quiet: bool, places: int) -> None:
        self.world = World(seed, [prefill], [decode], quiet=quiet, faults=0.0, places=places)

    def side(self, is_prefill: bool):
        return (self.world.prefill if is_prefill else self.world.decode)[0]

    @rule(steps=st.integers(1, 30))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @rule()
    def request(self) -> None:
        self.world.request()

    @rule(is_prefill=st.booleans(), rank=st.integers(0, 1))
    def abort(self, is_prefill: bool, rank: int) -> None:
        ends = self.side(is_prefill).ends
        end = ends[rank % len(ends)]
        for room in list(end.table.rooms.values()):
            end.abort(room.key.room, generation=room.key.generation, why="nobody waits for it")

    @rule(is_prefill=st.booleans(), rank=st.integers(0, 1))
    def lose_connections(self, is_prefill: bool, rank: int) -> None:
        ends = self.side(is_prefill).ends
        self.world.cut(ends[rank % len(ends)])

    @rule(rank=st.integers(0, 1), why=st.just("the engine lost its connection"))
    def lose_transfers(self, rank: int, why: str) -> None:
        ends = self.side(True).ends
        engine = ends[rank % len(ends)].engine
        for ticket in list(engine.open_pieces):
            engine.end(ticket, why)

    @rule(is_prefill=st.booleans(), steps=st.sampled_from([5, 100]))
    def stop(self, is_prefill: bool, steps: int) -> None:
        self.side(is_prefill).paused = steps

    @rule(is_prefill=st.booleans())
    def die(self, is_prefill: bool) -> None:
        self.world.restart(self.side(is_prefill))

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle_down()


Rooms.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRooms = pytest.mark.timeout(120)(Rooms.TestCase)
