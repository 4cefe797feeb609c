"""Sync rounds on processes as ranks: inside a host, host by host, ranks that are lost. Where a plugin has it, shared memory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import PeerError
from commplane.testing import run_processes, shm_leftovers

pytestmark = pytest.mark.timeout(90)

SPEC = SyncSpec(
    name="c",
    api=(1, 0),
    fields=(
        SyncField("sum", Vote.SUM),
        SyncField("first", Vote.LEADER),
        SyncField("low", Vote.MIN, 2),
        SyncField("any", Vote.ANY),
    ),
)


def rank_main(store: Any, rank: int, world_size: int, order: list[int], end: str) -> dict[str, Any]:
    """Some rounds, then one that rank 1 does not come to."""
    import commplane

    deadline = 2.0
    with commplane.init(store=store, rank=rank, world_size=world_size, config={"timeout": 20, "startup_timeout": 10}) as plane:
        votes = plane.sync_round("x", order, specs=[SPEC], timeout=deadline)
        agreed = []
        for i in range(10):
            mine: dict[str, Any] = {"c.sum": rank, "c.first": 100 * i + rank, "c.low": (rank, -rank), "c.any": int(rank == i)}
            if i % 2:
                votes.issue(mine, digest=i)
                agreed.append(dict(votes.result()))
            else:
                agreed.append(dict(votes.step(mine, digest=i)))
        out: dict[str, Any] = {
            "agreed": agreed,
            "hosts": [list(h) for h in plane.facts.hosts(order)],
            "communicators": {c.key.purpose: list(c.ranks) for c in votes.communicators},
        }
        began = time.monotonic()
        if rank == 1:
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(deadline + 1)
            return out
        try:
            if rank % 2:
                votes.step(mine)
            else:
                votes.issue(mine)
                votes.result()
        except PeerError as error:
            out.update(missing=list(error.missing_ranks), text=str(error), took=time.monotonic() - began)
        return out


def expected(ranks: list[int], order: list[int]) -> list[dict[str, Any]]:
    return [
        {"c.sum": sum(ranks), "c.first": 100 * i + order[0], "c.low": [0, -max(ranks)], "c.any": int(i in ranks)}
        for i in range(10)
    ]


@pytest.mark.parametrize(
    ("hosts", "order", "end", "communicators"),
    [
        pytest.param("aaa", [0, 1, 2], "killed", [{"sync_x": [0, 1, 2]}] * 3, id="one host, a rank is killed"),
        pytest.param(
            "abab",
            [3, 2, 1, 0],
            "absent",
            [
                {"sync_x_host": [2, 0]},
                {"sync_x_host": [3, 1]},
                {"sync_x_host": [2, 0], "sync_x_hosts": [3, 2]},
                {"sync_x_host": [3, 1], "sync_x_hosts": [3, 2]},
            ],
            marks=pytest.mark.long,
            id="two hosts of two, a rank stays away",
        ),
        pytest.param(
            "aab",
            [0, 1, 2],
            "killed",
            [{"sync_x_host": [0, 1], "sync_x_hosts": [0, 2]}, {"sync_x_host": [0, 1]}, {"sync_x_hosts": [0, 2]}],
            id="hosts of two and of one, a rank is killed",
        ),
    ],
)
def test_ranks_agree_through_the_hosts_they_are_on_and_the_one_that_is_lost_is_named_to_all(
    hosts: str, order: list[int], end: str, communicators: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    outcomes = run_processes(
        len(hosts),
        rank_main,
        order,
        end,
        env=lambda rank: {"COMMPLANE_HOST_ALIAS": hosts[rank], "COMMPLANE_FLIGHT_DIR": str(tmp_path)},
    )
    for o in outcomes:
        if end == "killed" and o.rank == 1:
            assert o.returncode == -signal.SIGKILL
            continue
        assert o.error is None, o.output
        assert o.result["agreed"] == expected(list(range(len(hosts))), order)
        assert o.result["communicators"] == communicators[o.rank]
        if o.rank != 1:
            assert o.result["missing"] == [1], o.result
            assert "sync round, step 11" in o.result["text"]
            # The deadline is 2 s; the rest is what a machine with something else to do may take.
            assert o.result["took"] < 15
    assert not shm_leftovers()
