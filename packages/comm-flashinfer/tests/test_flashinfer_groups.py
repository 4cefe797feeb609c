"""Any sub-group: ranks of a group are numbered within it, and orthogonal groups of one size are kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashinfer_double import Machine, plan_of, ranks_on

from commplane.runtime import Plane

pytestmark = pytest.mark.timeout(60)


def test_orthogonal_groups_of_equal_size_in_one_job_each_give_their_own_sum() -> None:
    machine = Machine()
    rows, columns = {0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}, {0: [0, 2], 2: [0, 2], 1: [1, 3], 3: [1, 3]}

    def rank(plane: Plane) -> Any:
        x = torch.full((2, 256), 10.0**plane.rank, dtype=torch.float32)
        me = plane.rank
        with plane.communicator("tp", ranks=rows[me]) as tp, plane.communicator("cp", ranks=columns[me]) as cp:
            states = plan_of(tp)["flashinfer"], plan_of(cp)["flashinfer"]
            return states, tp.all_reduce(x)[0, 0].item(), cp.all_reduce(x)[0, 0].item(), tp.all_reduce(x)[0, 0].item()

    said = ranks_on(machine, 4, rank)
    ready = ("ready", "ready")
    assert said == [
        (ready, 11.0, 101.0, 11.0),
        (ready, 11.0, 1010.0, 11.0),
        (ready, 1100.0, 101.0, 1100.0),
        (ready, 1100.0, 1010.0, 1100.0),
    ]


def test_a_group_in_another_order_than_the_global_one_has_its_own_ranks() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        if plane.rank not in (2, 1):
            return None
        with plane.communicator("moe", ranks=[2, 1]) as comm:
            return comm.all_reduce(torch.full((2, 256), plane.rank + 1.0))[0, 0].item()

    assert ranks_on(machine, 3, rank) == [None, 5.0, 5.0]
    made = {entry[0]: entry[2] for entry in machine.log if entry[1] == "create"}
    assert made == {2: 0, 1: 1}, "FlashInfer was told group ranks, not global ones"


def test_a_group_of_three_is_left_to_others_with_the_reason() -> None:
    from commplane.api import Facts, GroupKey, ProbeRequest, RankFacts, Unusable
    from commplane_flashinfer.probe import probe

    shared = {
        "host": "a",
        "pid_start": 1,
        "pid_namespace": "n",
        "shm_free": None,
        "memory_limit": None,
        "cores": (0,),
        "devices": (),
    }
    rest: dict[str, Any] = {**shared, "machine": "x86_64", "python": "3", "torch": None}
    facts = Facts(RankFacts(rank=r, pid=r + 1, shm_domain=0, **rest) for r in range(3))
    verdict = probe(ProbeRequest(GroupKey((0, 1, 2), "cuda", "tp"), 0, {}), facts)
    assert isinstance(verdict, Unusable)
    assert verdict.reason == "serves groups of 2, 4, 8, 16 ranks, this one has 3: use another backend for it"
    apart = Facts(RankFacts(rank=r, pid=r + 1, shm_domain=r, **rest) for r in range(2))
    verdict = probe(ProbeRequest(GroupKey((0, 1), "cuda", "tp"), 0, {}), apart)
    assert isinstance(verdict, Unusable)
    assert "spans hosts" in verdict.reason
