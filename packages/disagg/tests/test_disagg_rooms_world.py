"""Rooms under random delays, lost connections, aborts, stopped and killed replicas: many ranks, one thread, virtual time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from disagg_network import SimEngine
from disagg_world import World

from commplane.errors import CommplaneError
from commplane_disagg.ends.decode import DecodeEnd
from commplane_disagg.ends.prefill import PrefillEnd
from commplane_disagg.ranks import Grid
from commplane_disagg.rooms import RoomTable

pytestmark = pytest.mark.timeout(120)

GRIDS = [
    ([Grid(tp=2), Grid()], [Grid(tp=2), Grid(tp=1)]),
    ([Grid(tp=4)], [Grid(tp=2)]),
    ([Grid(tp=1, pp=2)], [Grid(tp=4), Grid(tp=2)]),
]
NAMES = ["mixed", "tp4-tp2", "pp2-tp4"]


def play(seed: int, grids: tuple[list[Grid], list[Grid]], *, quiet: bool) -> World:
    world = World(seed, *grids, quiet=quiet)
    world.play(300, trouble=0.04)
    world.settle_down()
    return world


@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "loud"])
@pytest.mark.parametrize("grids", GRIDS, ids=NAMES)
@pytest.mark.parametrize("seed", range(2))
def test_no_byte_lands_in_a_page_of_another_room_and_all_ranks_agree(
    grids: tuple[list[Grid], list[Grid]], seed: int, quiet: bool
) -> None:
    counts = play(seed, grids, quiet=quiet).counts
    assert counts["failed"] and counts["landed"], counts


@pytest.mark.long
@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "loud"])
@pytest.mark.parametrize("grids", GRIDS, ids=NAMES)
@pytest.mark.parametrize("seed", range(100, 140))
def test_the_same_for_many_more_seeds(grids: tuple[list[Grid], list[Grid]], seed: int, quiet: bool) -> None:
    play(seed, grids, quiet=quiet)


def frees_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DecodeEnd, "_is_over", lambda self, sender: True)


def says_drained_too_early(patch: pytest.MonkeyPatch) -> None:
    give_up = PrefillEnd._give_up

    def wrong(self: PrefillEnd, room: object) -> None:
        for receiver in room.data.receivers.values():  # type: ignore[attr-defined]
            receiver.tickets.clear()
        give_up(self, room)  # type: ignore[arg-type]

    patch.setattr(PrefillEnd, "_give_up", wrong)


def takes_its_own_word(patch: pytest.MonkeyPatch) -> None:
    move = RoomTable._move
    patch.setattr(RoomTable, "_move", lambda self, slot, room, word, changes: move(self, slot, room, self._word(room), changes))


def promises_what_it_does_not_keep(patch: pytest.MonkeyPatch) -> None:
    real = SimEngine.__init__
    patch.setattr(SimEngine, "__init__", lambda self, network, **how: real(self, network, **{**how, "quiet": False}))


@pytest.mark.parametrize(
    "mistake",
    [
        frees_at_once,
        says_drained_too_early,
        takes_its_own_word,
        promises_what_it_does_not_keep,
    ],
    ids=lambda m: m.__name__,
)
def test_the_simulation_finds_a_side_that(mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mistake(monkeypatch)
    for seed in range(40):
        try:
            play(seed, GRIDS[seed % 3], quiet=True)
        except (AssertionError, CommplaneError):
            return
    pytest.fail("nothing was found")
