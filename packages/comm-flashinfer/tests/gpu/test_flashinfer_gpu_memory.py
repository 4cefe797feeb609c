"""What workspaces take on a GPU is given back: after close, after growth, and where one rank had no room."""

from __future__ import annotations

import gc
import os

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


def held(rank: Rank) -> list[int]:
    """Used bytes of the GPU and open descriptors, when all ranks are idle."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    rank.plane.gather(0, what="idle")
    free, total = torch.cuda.mem_get_info(rank.device)
    rank.plane.gather(0, what="looked")
    return [total - free, len(os.listdir("/proc/self/fd"))]


def one_call(what: str, comm: Communicator, rank: Rank) -> None:
    layer = Layer(rank, DTYPE, 4, 1024, 1)
    with by_flashinfer(NORM):
        got = comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
    layer.check(what, *got)


def open_and_close(rank: Rank, times: int) -> None:
    """Each time small at first, then a workspace for 8 MiB, then a larger one in its place."""
    for _ in range(times):
        counting()
        with rank.form("leak", **room(16 * MIB)) as comm:
            for size in (8 * MIB, 16 * MIB):
                prepared(comm, DTYPE, size)
            one_call("leak", comm, rank)


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
            slack = 2 * MIB * on_one_gpu(size)
            assert after[0] - before[0] <= slack, (before, after)
            assert after[1] == before[1], (before, after)


def on_one_gpu(size: int) -> int:
    """How many ranks share what `held` sees."""
    return size if size > GPUS else 1


def grows(rank: Rank) -> list[int]:
    """Used bytes with nothing, with a small workspace, with a large one in its place, and after close."""
    open_and_close(rank, 1)
    out = [held(rank)[0]]
    with rank.form("grows", **room(64 * MIB)) as comm:
        for size in (16 * MIB, 64 * MIB):
            prepared(comm, DTYPE, size)
            out.append(held(rank)[0])
        one_call("grown", comm, rank)
    return [*out, held(rank)[0]]


@pytest.mark.parametrize("size", groups(most=2))
def test_a_workspace_that_grew_takes_the_place_of_the_smaller_one(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        for nothing, small, large, after in world.run(grows):
            sharing = on_one_gpu(size)
            for found, most in ((small, 16 * MIB), (large, 64 * MIB)):
                # A workspace takes four times the message for each rank of the group; beside it there is a small one of float32.
                needs = sharing * 4 * size * most
                assert needs <= found - nothing <= needs + sharing * 32 * MIB, (nothing, small, large)
            assert after - nothing <= sharing * 2 * MIB, (nothing, small, large, after)


def out_of_memory(rank: Rank, culprit: int) -> tuple[list[str], int]:
    """The errors of two calls of prepare where the GPU of `culprit` is full, and what they left behind; sums go on."""
    open_and_close(rank, 1)
    said: list[str] = []
    with rank.form("full", **room(100 * MIB)) as comm:
        prepared(comm, DTYPE, MIB)
        one_call("before", comm, rank)
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
        one_call("after", comm, rank)
        # Memory is there again: a need that did not fail before is met.
        prepared(comm, DTYPE, 50 * MIB)
        one_call("grown", comm, rank)
    return said, left


@pytest.mark.parametrize("size", groups(most=2))
def test_a_rank_without_memory_fails_all_and_leaves_nothing_behind(worlds: Worlds, size: int) -> None:
    """On one GPU for all ranks it is full for each of them; on GPUs of their own for the last rank alone."""
    with worlds.fresh(size) as world:
        for said, left in world.run(out_of_memory, size - 1):
            assert len(said) == 2, said
            assert "undone on all ranks" in said[0] and (on_one_gpu(size) > 1 or f"rank {size - 1}: " in said[0]), said
            assert "not tried again" in said[1], said
            assert left <= 2 * MIB * on_one_gpu(size), left
