"""No workspace is built while a capture is open, and what graphs point to is not freed under them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from flashinfer_double import Machine, ranks_on

from commplane.errors import CaptureError, CommplaneError
from commplane.runtime import Plane

pytestmark = pytest.mark.timeout(60)

LEAN = {"flashinfer": {"max_bytes": 1 << 16, "open_bytes": 8192, "float32_max_bytes": 4096}}


def test_prepare_inside_a_capture_of_the_plane_raises_at_once() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        inside = pytest.raises(CaptureError, match="prepare inside a capture")
        with plane.communicator("tp", options=LEAN) as comm, plane.capture(), inside:
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
        return machine.count("create", plane.rank)

    assert ranks_on(machine, 2, rank) == [2, 2]


def test_prepare_while_one_rank_captures_its_stream_builds_on_none_and_may_be_tried_again() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        with plane.communicator("tp", options=LEAN) as comm:
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


def test_what_a_graph_was_captured_on_stays_until_close() -> None:
    machine = Machine()

    def rank(plane: Plane) -> Any:
        x = torch.ones(2, 256, dtype=torch.bfloat16)
        with plane.communicator("tp", options=LEAN) as comm:
            with plane.capture():
                comm.all_reduce_(x)
            comm.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 16)
            return machine.count("destroy", plane.rank)

    assert ranks_on(machine, 2, rank) == [0, 0]
    gc.collect()
    assert machine.count("destroy") == 3
    assert machine.buffers() == 0
