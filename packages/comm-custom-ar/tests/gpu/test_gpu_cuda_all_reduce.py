"""all_reduce on GPUs: every algorithm, dtype, size and layout against a sum in rank order, and equal bits on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_numbers import DTYPES, bits, checksum, expect, inputs, reduced
from gpu_ranks import Rank, World, needs_gpu, sizes

pytestmark = needs_gpu()

ALGORITHMS = ["auto", "one_shot_push", "two_shot_push", "one_shot_pull", "two_shot_pull"]
MIB = 1 << 20
SMALL = [*range(1, 18), 1000, 4095, 4096, 4097]
LARGE_BYTES = [MIB + 6, 9 * MIB, 40 * MIB]
# Besides two ranks: what a third and a fourth one change.
FEW = [1, 3, 7, 8, 9, 16, 17, 1000, 4097]
FEW_BYTES = [MIB + 6, 9 * MIB]


def counts_of(world_size: int, dtype: torch.dtype) -> list[int]:
    small, large = (SMALL, LARGE_BYTES) if world_size == 2 else (FEW, FEW_BYTES)
    return [*small, *(nbytes // dtype.itemsize for nbytes in large)]


def sums(rank: Rank, algorithm: str, name: str) -> list[int]:
    tp, dtype, device = rank.comm(algorithm=algorithm), DTYPES[name], rank.device
    counts = counts_of(rank.world_size, dtype)
    pull = algorithm.endswith("_pull") or algorithm == "auto"
    room = tp.empty(max(counts) + 64, dtype=dtype) if pull else torch.empty(max(counts) + 64, dtype=dtype, device=device)
    checks = []
    for seed, count in enumerate(counts):
        parts = inputs(rank.world_size, count, dtype, seed, device)
        mine, wanted = parts[rank.rank], reduced(parts)
        aligned, crooked = room[:count], room[1 : count + 1]
        for what, view in (("aligned", aligned), ("misaligned", crooked)):
            view.copy_(mine)
            out = tp.all_reduce(view)
            expect((algorithm, name, count, what, "out of place"), out, wanted)
            expect((algorithm, name, count, what, "its input"), view, mine)
            # Twice without a wait between them: what a peer still reads must not be overwritten.
            again = tp.all_reduce(view)
            assert tp.all_reduce_(view) is view
            expect((algorithm, name, count, what, "again"), again, wanted)
            expect((algorithm, name, count, what, "in place"), view, wanted)
            checks += [checksum(out), checksum(view)]
    return checks


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("size", sizes())
def test_every_size_is_summed_in_rank_order_to_the_same_bits_on_all_ranks(world: World, algorithm: str, name: str) -> None:
    first, *others = world.run(sums, algorithm, name)
    assert all(other == first for other in others)


def special(rank: Rank, algorithm: str, name: str) -> list[int]:
    """Each special value of one rank meets each of the others."""
    tp, dtype, device = rank.comm(algorithm=algorithm), DTYPES[name], rank.device
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), tiny, -tiny, 1.0], device=device).to(dtype)
    # All bits set: what marks an empty place in a buffer must not be mistaken for it.
    full = torch.full((1,), -1, dtype=bits(values).dtype, device=device).view(dtype)
    values = torch.cat([values, full])
    k, checks = len(values), []
    for count in (k * k, 4096, 300_001):
        parts = [values.repeat(k), values.repeat_interleave(k), *[values.roll(r).repeat(k) for r in range(2, rank.world_size)]]
        parts = [part.repeat(-(-count // (k * k)))[:count].contiguous() for part in parts[: rank.world_size]]
        wanted = reduced(parts)
        mine = tp.empty(count, dtype=dtype).copy_(parts[rank.rank])
        out = tp.all_reduce(mine)
        expect((algorithm, name, count, "out of place"), out, wanted)
        assert torch.equal(bits(mine), bits(parts[rank.rank])), "out of place changed its input"
        tp.all_reduce_(mine)
        expect((algorithm, name, count, "in place"), mine, wanted)
        checks += [checksum(out), checksum(mine)]
        everywhere = tp.all_reduce(torch.full((count,), -0.0, dtype=dtype, device=device))
        assert bool(torch.signbit(everywhere).all()), "the sum of -0.0 on all ranks is -0.0"
        every_nan = tp.all_reduce(full.repeat(count))
        assert bool(every_nan.isnan().all()), "NaN with all bits set is a NaN like any other"
    return checks


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("algorithm", ALGORITHMS[1:])
@pytest.mark.parametrize("size", sizes(most=3))
def test_nan_infinities_and_negative_zero_come_out_as_torch_adds_them(world: World, algorithm: str, name: str) -> None:
    first, *others = world.run(special, algorithm, name)
    assert all(other == first for other in others)


def layouts(rank: Rank) -> None:
    tp, device = rank.comm(), rank.device
    for dtype in DTYPES.values():
        for rows, columns in ((3, 5), (64, 130), (700, 1111)):
            parts = [p.view(rows, columns) for p in inputs(rank.world_size, rows * columns, dtype, rows, device)]
            mine, wanted = parts[rank.rank], reduced(parts)
            views = {
                "transposed": mine.t().contiguous().t(),
                "sliced": torch.zeros(2 * rows, columns + 3, dtype=dtype, device=device)[::2, 1 : columns + 1].copy_(mine),
                "symmetric, sliced": tp.empty(rows, columns + 8, dtype=dtype)[:, :columns].copy_(mine),
            }
            for what, view in views.items():
                expect((what, dtype, "out of place"), tp.all_reduce(view), wanted)
                expect((what, dtype, "its input"), view, mine)
                tp.all_reduce_(view)
                expect((what, dtype, "in place"), view, wanted)
    assert tp.all_reduce(torch.empty(0, device=device)).numel() == 0
    scalar = tp.all_reduce(torch.tensor(2.0, device=device))
    assert scalar.shape == () and scalar.item() == 2.0 * rank.world_size


@pytest.mark.parametrize("size", sizes(most=3))
def test_tensors_of_any_layout_are_summed(world: World) -> None:
    world.run(layouts)


def mixed(rank: Rank, seed: int) -> list[int]:
    """Sizes in an order drawn at random, no wait between the calls, inputs used up at once."""
    tp, device = rank.comm(), rank.device
    generator = torch.Generator().manual_seed(seed)
    work: list[Any] = []
    for step in range(120):
        count = int(2 ** (float(torch.rand(1, generator=generator)) * 21))
        dtype = list(DTYPES.values())[step % 3]
        parts = inputs(rank.world_size, count, dtype, 1000 * seed + step, device)
        mine = parts[rank.rank].clone()
        out = tp.all_reduce(mine) if step % 2 else tp.all_reduce_(mine)
        if step % 2:
            mine.zero_()  # queued behind the call, which must have read it by then
        work.append((step, out, reduced(parts)))
    for step, out, wanted in work:
        expect(step, out, wanted)
    return [checksum(out) for _, out, _ in work]


@pytest.mark.parametrize("size", sizes())
def test_calls_of_random_sizes_follow_each_other_without_a_wait(world: World) -> None:
    first, *others = world.run(mixed, 7)
    assert all(other == first for other in others)


def declared(rank: Rank) -> list[str]:
    said = []
    tp = rank.comm()
    for nbytes in (1, 8192, MIB, 9 * MIB, 64 * MIB):
        said.append(str(tp.plan.explain("all_reduce", nbytes=nbytes, dtype=torch.bfloat16)))
    return said


@pytest.mark.parametrize("size", sizes())
def test_the_plan_is_the_same_on_all_ranks_and_names_algorithms(world: World) -> None:
    first, *others = world.run(declared)
    assert all(other == first for other in others)
    assert "custom_ar" in first[0] and "one_shot_push" in first[1], first
