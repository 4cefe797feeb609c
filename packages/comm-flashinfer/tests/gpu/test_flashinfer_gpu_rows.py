"""Rows that FlashInfer's two-shot refuses or that are no multiple of anything, and sums that are one row."""

from __future__ import annotations

import pytest
import torch
from flashinfer_gpu import EPS, Layer, by_flashinfer, check_quantised, groups, how_to, marks, most_bytes, ready, serves
from gpu_numbers import DTYPES, expect, inputs, reduced
from gpu_ranks import Rank, World

from commplane_flashinfer.patterns import ALL_REDUCE, NORM

pytestmark = marks()


def short_rows(rank: Rank, name: str, algorithm: str) -> None:
    """From one vector of 16 bytes on."""
    dtype, n = DTYPES[name], rank.world_size
    vector = 16 // dtype.itemsize
    tp = ready(rank, dtype, algorithm=algorithm)
    for vectors in (1, 2, 3, n - 1, n, n + 1, 31, 33):
        for tokens in (1, n, n + 1, 5 * n + 1, 200):
            hidden = vectors * vector
            if tokens * vectors * 16 > most_bytes(rank):
                continue
            layer = Layer(rank, dtype, tokens, hidden, tokens + hidden)
            serves(tp, "all_reduce_rms_norm", layer.mine.nbytes, dtype)
            one_shot = algorithm == "auto" or vectors < n or tokens <= n
            with by_flashinfer(NORM, one_shot=one_shot):
                norm, residual = tp.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
            layer.check((name, algorithm, tokens, hidden), norm, residual)


@pytest.mark.parametrize("algorithm", ["auto", "two_shot"])
@pytest.mark.parametrize("name", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", groups())
def test_rows_of_fewer_vectors_than_ranks_go_by_one_shot_and_are_right(world: World, name: str, algorithm: str) -> None:
    world.run(short_rows, name, algorithm)


def short_rows_quantised(rank: Rank, kind: str) -> None:
    tp, how = ready(rank, torch.bfloat16, algorithm="two_shot"), how_to(kind, rank.device)
    for hidden in (8, 16, 24, 264):
        layer = Layer(rank, torch.bfloat16, 40, hidden, hidden)
        check_quantised((kind, hidden), tp, layer, how, one_shot=hidden // 8 < rank.world_size)


@pytest.mark.parametrize("kind", ["fp8_static", "fp8_token"])
@pytest.mark.parametrize("size", groups())
def test_short_rows_are_quantised_as_long_ones(world: World, kind: str) -> None:
    world.run(short_rows_quantised, kind)


def one_row(rank: Rank, name: str) -> int:
    """Sums that 256 elements do not divide, each after a larger one; how often memory was allocated in place."""
    dtype, allocated = DTYPES[name], 0
    tp = ready(rank, dtype)
    large = torch.ones(16384 // dtype.itemsize, dtype=dtype, device=rank.device)
    for count in (264, 1000, 1016, 4088, 16384 // dtype.itemsize - 8):
        parts = inputs(rank.world_size, count, dtype, count, rank.device)
        wanted, mine = reduced(parts), parts[rank.rank]
        serves(tp, "all_reduce", mine.nbytes, dtype)
        with by_flashinfer(ALL_REDUCE, one_shot=True):
            for _ in range(4):  # as many as there are turns of the memory that they go through
                tp.all_reduce_(large.fill_(1))
                expect((name, count), tp.all_reduce(mine), wanted)
            before = torch.cuda.memory_stats(rank.device)["allocation.all.allocated"]
            tp.all_reduce_(mine)
            allocated += torch.cuda.memory_stats(rank.device)["allocation.all.allocated"] - before
        expect((name, count, "in place"), mine, wanted)
    return allocated


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", groups())
def test_a_short_sum_of_whole_vectors_is_right_and_in_place_allocates_nothing(world: World, name: str) -> None:
    assert world.run(one_row, name) == [0] * world.size
