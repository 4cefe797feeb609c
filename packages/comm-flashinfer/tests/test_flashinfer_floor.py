"""The smallest settings that are accepted leave room for what the backend is tried with, in groups of every size."""

from __future__ import annotations

import pytest
import torch
from flashinfer_double import Machine, plan_of, ranks_on

from commplane.runtime import Plane

pytestmark = pytest.mark.timeout(60)

FLOOR = {"max_bytes": 4096, "float32_max_bytes": 4096}
OPENED = {"max_bytes": 1 << 20, "float32_max_bytes": 1 << 20, "open_bytes": 4096}


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(2, FLOOR, id="2"),
        pytest.param(4, OPENED, id="4, opened smaller"),
        pytest.param(8, FLOOR, id="8", marks=pytest.mark.long),
        pytest.param(8, OPENED, id="8, opened smaller", marks=pytest.mark.long),
        pytest.param(16, FLOOR, id="16", marks=pytest.mark.long),
        pytest.param(16, OPENED, id="16, opened smaller", marks=pytest.mark.long),
    ],
)
def test_the_backend_is_ready_at_the_floor_of_its_settings(world_size: int, options: dict[str, int]) -> None:
    def rank(plane: Plane) -> tuple[str, str | None, float]:
        with plane.communicator("tp") as comm:
            x = torch.ones(16, dtype=torch.bfloat16)
            chosen = comm.plan.explain("all_reduce", nbytes=x.nbytes, dtype="bfloat16").chosen
            return plan_of(comm)["flashinfer"], chosen, float(comm.all_reduce(x)[0])

    assert ranks_on(Machine(), world_size, rank, options) == [("ready", "flashinfer", float(world_size))] * world_size
