"""No workspace is built while a capture is open, and what graphs point to is not freed under them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flashinfer_double import Machine, ranks_on

from commplane.errors import CaptureError, CommplaneError
from commplane.runtime import Plane

pytestmark = pytest.mark.timeout(60)

LEAN = {"max_bytes": 1 << 16, "open_bytes": 8192, "float32_max_bytes": 1 << 16}


def test_prepare_inside_a_capture_of_the_plane_raises_at_once() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        inside = pytest.raises(CaptureError, match="prepare inside a capture")
        with plane.communicator("tp", options={"flashinfer": LEAN}) as comm, plane.capture(), inside:
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
        return machine.count("create", plane.rank)

    assert ranks_on(machine, 2, rank) == [2, 2]


def test_prepare_while_one_rank_captures_its_stream_builds_on_none_and_may_be_tried_again() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp", options={"flashinfer": LEAN}) as comm:
            comm.barrier()
            machine.capturing = {1}
            comm.barrier()
            with pytest.raises(CommplaneError, match="inside a CUDA graph capture of rank 1: call prepare before the capture"):
                comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
            tried = machine.count("create", plane.rank)
            comm.barrier()
            machine.capturing = set()
            comm.barrier()
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
            return tried, machine.count("create", plane.rank)

    assert ranks_on(machine, 2, rank) == [(2, 3)] * 2


def grown(machine: Machine, plane: Plane, captured: torch.dtype | None, **options: Any) -> tuple[int, list[str]]:
    """How many workspaces went when both kinds were grown after a capture with a call of `captured`, and what failed."""
    errors = []
    with plane.communicator("tp", options={"flashinfer": {**LEAN, **options}}) as comm:
        with plane.capture():
            if captured is not None:
                comm.all_reduce_(torch.ones(2, 256, dtype=captured))
        for dtype in (torch.bfloat16, torch.float32):
            comm.all_reduce_(torch.ones(2, 256, dtype=dtype))  # eager
            try:
                comm.prepare("all_reduce", dtype=dtype, max_bytes=1 << 16)
            except CommplaneError as error:
                errors.append(str(error))
        return machine.count("destroy", plane.rank), errors


@pytest.mark.parametrize(("captured", "freed"), [(None, 2), (torch.bfloat16, 1), (torch.float32, 1)])
def test_of_a_growth_only_what_a_call_was_captured_on_stays_until_close(captured: torch.dtype | None, freed: int) -> None:
    machine = Machine()
    assert ranks_on(machine, 2, lambda plane: grown(machine, plane, captured)) == [(freed, [])] * 2
    assert machine.count("destroy") == 4
    assert machine.buffers() == 0


def test_what_graphs_keep_counts_among_what_workspaces_may_take() -> None:
    machine = Machine()
    limit = 2 * (6 << 20)  # of two, each of the smallest size
    said = ranks_on(machine, 2, lambda plane: grown(machine, plane, torch.bfloat16, max_workspace_bytes=limit))
    for freed, errors in said:
        # That for 16 bits would have been the third; that for float32, which no graph has, takes the place of the old one.
        assert freed == 1
        (error,) = errors
        assert (
            "ranks 0, 1: wanted at most 12582912 bytes of workspaces (max_workspace_bytes), found 18874368 with what captured "
            "graphs keep: call prepare before the first capture, or raise it"
        ) in error
    assert machine.buffers() == 0
