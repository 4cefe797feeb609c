"""What workspaces take on a GPU is given back: after close, after growth, and where one rank had no room."""

from __future__ import annotations

import gc
import os

import pytest
import torch
from flashinfer_gpu import EPS, Layer, groups, marks
from gpu_ranks import GPUS, Rank, Worlds

from commplane import errors

pytestmark = marks()

DTYPE = torch.bfloat16
MIB = 1 << 20


def held(rank: Rank) -> list[int]:
    """Used bytes of the GPU and open descriptors, when all ranks are idle."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    rank.plane.gather(0, what="idle")
    free, total = torch.cuda.mem_get_info(rank.device)
    rank.plane.gather(0, what="looked")
    return [total - free, len(os.listdir("/proc/self/fd"))]


def open_and_close(rank: Rank, times: int) -> None:
    for _ in range(times):
        with rank.form("leak") as comm:
            for collective in ("all_reduce", "all_reduce_rms_norm"):
                comm.prepare(collective, dtype=DTYPE, max_bytes=8 * MIB)
            comm.prepare("all_reduce_rms_norm", dtype=DTYPE, max_bytes=16 * MIB)  # grows
            layer = Layer(rank, DTYPE, 4, 1024, 1)
            layer.check("leak", *comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS))


def leaks(rank: Rank) -> list[list[int]]:
    open_and_close(rank, 2)
    before = held(rank)
    open_and_close(rank, 4)
    return [before, held(rank)]


@pytest.mark.parametrize("size", groups())
def test_memory_and_descriptors_come_back_after_close(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        for before, after in world.run(leaks):
            # FlashInfer keeps 20 bytes a workspace, which come out of pages of 2 MiB: at most one of those a rank.
            slack = 2 * MIB * (size if size > GPUS else 1)
            assert after[0] - before[0] <= slack, (before, after)
            assert after[1] == before[1], (before, after)


def grows(rank: Rank) -> list[int]:
    """Used bytes with nothing, with a small workspace, and with a large one in its place."""
    open_and_close(rank, 1)
    out = [held(rank)[0]]
    with rank.form("grows") as comm:
        for size in (16 * MIB, 64 * MIB):
            comm.prepare("all_reduce_rms_norm", dtype=DTYPE, max_bytes=size)
            out.append(held(rank)[0])
    return [*out, held(rank)[0]]


@pytest.mark.skipif(GPUS < 2, reason="wants 2 GPUs: on one the used bytes are those of all ranks")
@pytest.mark.parametrize("size", groups(most=2))
def test_a_workspace_that_grew_takes_the_place_of_the_smaller_one(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        for nothing, small, large, after in world.run(grows):
            needs = 4 * size * 64 * MIB
            assert needs * 0.9 <= large - nothing <= needs + 32 * MIB, (nothing, small, large)
            assert small < large and after - nothing <= 2 * MIB, (nothing, small, large, after)


def out_of_memory(rank: Rank, culprit: int) -> tuple[list[str], int, bool]:
    """The errors of two calls of prepare where the GPU of `culprit` is full, what was left behind, and whether sums go on."""
    open_and_close(rank, 1)
    said: list[str] = []
    with rank.form("full") as comm:
        comm.prepare("all_reduce_rms_norm", dtype=DTYPE, max_bytes=MIB)
        before = held(rank)[0]
        filler = None
        if rank.rank == culprit:
            free, _ = torch.cuda.mem_get_info(rank.device)
            filler = torch.empty(free - 160 * MIB, dtype=torch.uint8, device=rank.device)
        rank.plane.gather(0, what="filled")
        for _ in range(2):
            try:
                comm.prepare("all_reduce_rms_norm", dtype=DTYPE, max_bytes=100 * MIB)
            except errors.CommplaneError as error:
                said.append(f"{type(error).__name__}: {error}")
        del filler
        left = held(rank)[0] - before
        layer = Layer(rank, DTYPE, 4, 1024, 1)
        layer.check("after", *comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS))
    return said, left, True


@pytest.mark.skipif(GPUS < 2, reason="wants 2 GPUs: ranks on one GPU share its memory, so none can be full alone")
@pytest.mark.parametrize("size", groups(most=2))
def test_one_rank_without_memory_fails_all_and_leaves_nothing_behind(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        for said, left, goes_on in world.run(out_of_memory, size - 1):
            assert len(said) == 2 and goes_on, said
            assert f"rank {size - 1}" in said[0], said
            assert left <= 2 * MIB, left
