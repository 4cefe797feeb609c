"""The end of a lane: its helper ends, and what was queued has run."""

from __future__ import annotations

import threading

import pytest

from commplane.c10d import lane as lanes
from commplane.c10d.lane import Lane

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("round_", range(lanes._IDLE, lanes._IDLE + 4))
def test_the_helper_ends_in_whichever_of_its_waits_the_end_comes(round_: int) -> None:
    """The end comes in one wait of `_GRACE`, which spends the event: the rounds are those around the last before it sleeps."""

    class Closes(threading.Event):
        rounds = 0

        def wait(self, timeout: float | None = None) -> bool:
            if timeout is None:
                return super().wait(None)
            self.rounds += 1
            if self.rounds == round_:
                lane.close()
            return super().wait(0)

    lane = Lane(f"test {round_}")
    lane._wake = Closes()
    lane.finish(lane.queue(lambda: None))
    helper = lane._helper
    assert helper is not None
    if round_ > lanes._IDLE + 2:  # it sleeps by then, and no round comes any more
        lane.close()
    helper.join(20)
    assert not helper.is_alive()


def test_what_is_queued_when_the_end_comes_and_after_it_runs() -> None:
    ran: list[int] = []
    jobs = []
    for number in range(50):
        lane = Lane(f"test {number}")
        jobs.append(lane.queue(lambda number=number: ran.append(number)))
        lane.close()
        assert lane._helper is not None
        lane._helper.join(20)
        late = lane.queue(lambda number=number: ran.append(-number))
        assert late.done
    assert all(job.done for job in jobs) and sorted(ran) == sorted([*range(50), *(-n for n in range(50))])
