"""A creation that breaks on one rank, after every rank's driver has said that there is room, leaves the GPU as it was on all."""

from __future__ import annotations

import gc
import itertools
import os
from typing import Any

import pytest
import torch
from flashinfer_gpu import EPS, Layer, by_flashinfer, counting, groups, marks, prepared, room
from gpu_ranks import GPUS, Rank, Worlds

from commplane import errors
from commplane.runtime import Communicator
from commplane_flashinfer.patterns import NORM

pytestmark = marks()

DTYPE = torch.bfloat16
MIB = 1 << 20
BUFFERS = 3
"""Allocations of a workspace."""


def look(rank: Rank) -> list[int]:
    """Used bytes of the GPU and open descriptors, when all ranks are idle. Nothing is collected: it has to be gone by itself."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    rank.plane.gather(0, what="idle")
    free, total = torch.cuda.mem_get_info(rank.device)
    rank.plane.gather(0, what="looked")
    return [total - free, len(os.listdir("/proc/self/fd"))]


def broken_build(comm: Communicator, breaks_at: int | None, most: int) -> str:
    """What prepare says where this rank cannot make the buffer `breaks_at`. Collective."""
    from flashinfer.comm import trtllm_ar

    real, made = trtllm_ar.SymmDeviceMemory, itertools.count()

    def memory(*args: Any, **kwargs: Any) -> Any:
        if next(made) == breaks_at:
            raise RuntimeError("this buffer is broken by the test")
        return real(*args, **kwargs)

    trtllm_ar.SymmDeviceMemory = memory
    try:
        comm.prepare("all_reduce_rms_norm", dtype=DTYPE, max_bytes=most)
    except errors.CommplaneError as error:
        return str(error)
    finally:
        trtllm_ar.SymmDeviceMemory = real
    return "prepare raised nothing"


def one_call(what: str, comm: Communicator, rank: Rank) -> None:
    layer = Layer(rank, DTYPE, 4, 1024, 1)
    with by_flashinfer(NORM):
        got = comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
    layer.check(what, *got)


def breaks(rank: Rank, culprit: int) -> list[tuple[str, list[int], list[int]]]:
    """For each buffer that breaks on `culprit`: the error, and what was held before and after."""
    counting()
    out = []
    with rank.form("broken", **room(64 * MIB)) as comm:
        prepared(comm, DTYPE, MIB)
        one_call("before", comm, rank)
        broken_build(comm, 0 if rank.rank == culprit else None, 4 * MIB)  # what a first failure imports stays
        gc.collect()
        gc.disable()
        try:
            for buffer in range(BUFFERS):
                before = look(rank)
                # A need that failed is not tried again, so each is another one.
                said = broken_build(comm, buffer if rank.rank == culprit else None, (8 << buffer) * MIB)
                out.append((said, before, look(rank)))
        finally:
            gc.enable()
        one_call("after", comm, rank)
        prepared(comm, DTYPE, 64 * MIB)
        one_call("grown", comm, rank)
    return out


@pytest.mark.parametrize("size", groups())
def test_what_breaks_half_way_on_one_rank_is_undone_on_all_without_the_collector(worlds: Worlds, size: int) -> None:
    slack = 2 * MIB * (size if size > GPUS else 1)  # a page of the driver for each rank that shares the GPU
    with worlds.fresh(size) as world:
        for found in world.run(breaks, size - 1):
            assert len(found) == BUFFERS
            for said, before, after in found:
                assert f"undone on all ranks: rank {size - 1}: RuntimeError: this buffer is broken by the test" in said, found
                assert after[0] - before[0] <= slack, found
                assert after[1] == before[1], found
