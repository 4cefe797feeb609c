"""What communicators and symmetric tensors took on a GPU and of file descriptors is given back."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
from gpu_ranks import Rank, World, needs_gpu, sizes

pytestmark = needs_gpu()

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


def opens_and_closes(rank: Rank, times: int) -> None:
    for _ in range(times):
        with rank.form("leak") as tp:
            x = tp.empty(2 * MIB, dtype=torch.float32).fill_(1.0)
            assert float(tp.all_reduce(x)[0]) == rank.world_size
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with rank.plane.capture(), torch.cuda.graph(graph):
                tp.all_reduce_(x)
            graph.replay()
            torch.cuda.synchronize()
            del graph, x


def before_and_after(rank: Rank, times: int) -> dict[str, Any]:
    opens_and_closes(rank, 3)  # what CUDA and torch keep once and for all
    before = held(rank)
    opens_and_closes(rank, times)
    return {"before": before, "after": held(rank)}


@pytest.mark.parametrize("size", sizes(most=2))
def test_twenty_communicators_give_back_memory_and_descriptors(world: World) -> None:
    for said in world.run(before_and_after, 20):
        (memory, files), (memory_after, files_after) = said["before"], said["after"]
        # Twenty communicators have some hundred MiB; the driver rounds to its own granularity of 2 MiB.
        assert memory_after - memory <= 8 * MIB, said
        assert files_after <= files, said


def symmetric(rank: Rank) -> dict[str, Any]:
    tp = rank.form("symmetric")
    before = held(rank)
    tensors = [tp.empty(16 * MIB, dtype=torch.bfloat16) for _ in range(4)]
    during = held(rank)
    tensors.clear()
    gc.collect()
    tp.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1)  # frees what all ranks have let go of
    after = held(rank)
    tp.close()
    return {"before": before, "during": during, "after": after}


@pytest.mark.parametrize("size", sizes(most=3))
def test_symmetric_tensors_are_freed_when_all_ranks_have_let_go(world: World) -> None:
    for said in world.run(symmetric):
        assert said["during"][0] - said["before"][0] >= 4 * 32 * MIB, said
        assert said["after"][0] - said["before"][0] <= 8 * MIB, said
