"""What the ranks of a replica agreed on about each room is in the flight records, alike on all of them."""

from __future__ import annotations

import pytest
from disagg_sides import Side, fill, run_until

from commplane_disagg.ends import DecodeEnd, PrefillEnd
from commplane_disagg.ranks import Grid

pytestmark = pytest.mark.timeout(60)


def test_agreed_changes_of_rooms_are_noted_alike_on_all_ranks_with_their_steps() -> None:
    p, d = Side(PrefillEnd, Grid(tp=2)), Side(DecodeEnd, Grid(tp=2))
    try:
        fill(p)
        for room in (7, 8):
            for end in d.ends:
                end.receive(room, [room], p.source())
        for end in p.ends:
            end.send(7, [3])
            end.open_room(8)
        d.ends[1].abort(8)
        run_until(lambda: all(set(s.released(r)) == {7, 8} for s in (p, d) for r in (0, 1)), p, d)
        for side in (p, d):
            first, second = (one.notes.last() for one in side.rounds)
            assert first == second
            assert all(0 < step <= side.rounds[0].steps for _, step, _ in first)
            said = [what for _, _, what in first]
            assert [what for what in said if what.endswith(" 7 0")] == ["room success 7 0", "room released 7 0"]
            assert [what for what in said if what.endswith(" 8 0")] == ["room failed 8 0", "room error 8 0", "room released 8 0"]
    finally:
        p.close()
        d.close()
