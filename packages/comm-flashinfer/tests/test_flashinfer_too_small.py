"""A message that the workspaces do not hold yet: said on every rank, and `prepare` on the same communicator mends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashinfer_double import Machine, ranks_on

from commplane.errors import WorkspaceTooSmall
from commplane.runtime import Plane

pytestmark = pytest.mark.timeout(60)

SMALL_AT_FIRST = {"max_bytes": 1 << 16, "open_bytes": 8192, "float32_max_bytes": 4096}


def test_a_call_that_wants_a_larger_workspace_leaves_the_communicator_as_it_was() -> None:
    machine = Machine()

    def rank(plane: Plane) -> list[Any]:
        with plane.communicator("tp") as comm:
            x = torch.full((128, 256), float(comm.rank + 1), dtype=torch.bfloat16)
            weight = torch.ones(256, dtype=torch.bfloat16)
            said = []
            for call in (lambda: comm.all_reduce(x), lambda: comm.all_reduce_rms_norm(x, x, weight)):
                with pytest.raises(WorkspaceTooSmall) as caught:
                    call()
                said.append(str(caught.value).partition("] ")[2])
            assert float(comm.all_reduce(x[:8])[0, 0]) == 3.0  # what fits goes on
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=x.nbytes)
            return [*said, comm.all_reduce(x).float().unique().tolist(), comm.all_reduce_rms_norm(x, x * 0, weight)[1].max()]

    first, second = ranks_on(machine, 2, rank, SMALL_AT_FIRST)
    text = "wanted room for 32768 elements (8 x 4096), the workspace has room for 4096: call prepare() with max_bytes of 65536"
    assert text in first[0]
    assert "wanted room for 32768 elements (128 x 256)" in first[1]
    assert first == second
    assert first[2:] == [[3.0], 3.0]
    assert machine.count("create") == 3  # two at open, the larger one by prepare
