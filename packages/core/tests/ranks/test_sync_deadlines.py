"""Sync rounds on processes as ranks that come one after the other: when each gives up, and whom it names."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import PeerError
from commplane.testing import run_processes

pytestmark = pytest.mark.timeout(90)

SPEC = SyncSpec(name="c", api=(1, 0), fields=(SyncField("low", Vote.MIN),))
DEADLINE = 3.0


def rank_main(
    store: Any, rank: int, world_size: int, late: list[float], read: list[float], backends: list[str] | None
) -> list[int]:
    """A round that all come to, then one that each comes to so late, in deadlines: the ranks it names; [] if it stays away.

    `late` is when each rank comes, those with 9 stay away; `read` how long after that it reads what it issued, 0: it steps.
    """
    import commplane

    settings = {"timeout": 20, "startup_timeout": 10}
    with commplane.init(store=store, rank=rank, world_size=world_size, config=settings) as plane:
        votes = plane.sync_round("x", specs=[SPEC], timeout=DEADLINE, backends=backends)
        votes.step({"c.low": rank})
        if late[rank] == 9:
            time.sleep(2.2 * DEADLINE)
            return []
        time.sleep(late[rank] * DEADLINE)
        with pytest.raises(PeerError) as raised:
            if read[rank]:
                votes.issue({"c.low": rank})
                time.sleep(read[rank] * DEADLINE)
                votes.result()
            else:
                votes.step({"c.low": rank})
        return list(raised.value.missing_ranks)


@pytest.mark.parametrize(
    ("hosts", "backends", "late", "read", "named"),
    [
        # Rank 2 comes when rank 0 and rank 1 have had their answer: it was not there, and the others were.
        pytest.param(
            "aaaa",
            ["torch"],
            [0, 0.6, 1.4, 9],
            [0] * 4,
            [[2, 3], [2, 3], [3], []],
            marks=pytest.mark.long,
            id="one after the other through Gloo",
        ),
        pytest.param(
            "aabb",
            None,
            [0, 0.6, 0, 9],
            [0, 0, 0.01, 0],
            [[3]] * 3 + [[]],
            marks=pytest.mark.long,
            id="host by host, one late and one away",
        ),
        pytest.param(
            "aaa",
            ["torch"],
            [0, 0, 9],
            [0.01, 1.6, 0],
            [[2], [2], []],
            marks=pytest.mark.long,
            id="one is busy after it issued",
        ),
    ],
)
def test_a_rank_gives_up_at_its_own_deadline_and_none_that_is_in_the_round_is_named(
    hosts: str, backends: list[str] | None, late: list[float], read: list[float], named: list[list[int]], tmp_path: Path
) -> None:
    outcomes = run_processes(
        len(hosts),
        rank_main,
        late,
        read,
        backends,
        env=lambda rank: {"COMMPLANE_HOST_ALIAS": hosts[rank], "COMMPLANE_FLIGHT_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert [o.error for o in outcomes] == [None] * len(hosts), [o.output for o in outcomes]
    assert [o.result for o in outcomes] == named
