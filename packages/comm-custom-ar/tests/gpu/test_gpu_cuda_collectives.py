"""The other collectives on GPUs: the fused norm against its parts, moves, barrier, sub-groups, several communicators at once."""

from __future__ import annotations

import pytest
import torch
from gpu_numbers import DTYPES, bits, checksum, expect, inputs, reduced, ulps
from gpu_ranks import Rank, World, needs_gpu, sizes

from commplane.api import add_rms_norm

pytestmark = needs_gpu()

HIDDENS = [64, 72, 100, 127, 1000, 1024, 4096, 5120, 7168, 8191, 16384]
# The sum of squares and the square root come in another order or instruction than torch's: more places in 24 bits than in 11.
PLACES = {"float32": 8.0, "float16": 2.0, "bfloat16": 2.0}


def norms(rank: Rank, name: str) -> list[int]:
    tp, dtype, device, n = rank.comm(), DTYPES[name], rank.device, rank.world_size
    checks = []
    for hidden in HIDDENS if n == 2 else HIDDENS[::3]:
        for rows in (1, 5, 130):
            for bias in (0.0, 1.0):
                parts = inputs(n, rows * hidden, dtype, rows * hidden, device)
                mine = parts[rank.rank].view(rows, hidden)
                before, weight = inputs(2, rows * hidden, dtype, 5, device)
                before, weight = before.view(rows, hidden), weight[:hidden].contiguous()
                wanted_norm, wanted = add_rms_norm(reduced(parts).view(rows, hidden), before, weight, 1e-6, bias)
                what = (name, rows, hidden, bias)
                norm, residual = tp.all_reduce_rms_norm(mine, before, weight, 1e-6, bias)
                expect((what, "residual"), residual, wanted)
                far = ulps(norm, wanted_norm)
                assert far <= PLACES[name], (what, far)
                x, r = mine.clone(), before.clone()
                tp.all_reduce_rms_norm_(x, r, weight, 1e-6, bias)
                assert torch.equal(bits(x), bits(norm)) and torch.equal(bits(r), bits(residual)), (what, "in place")
                checks += [checksum(norm), checksum(residual)]
    return checks


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", sizes())
def test_the_fused_norm_is_an_all_reduce_and_a_norm(world: World, name: str) -> None:
    first, *others = world.run(norms, name)
    assert all(other == first for other in others)


def large_norm(rank: Rank) -> list[int]:
    """More than one kernel takes, and tensors that begin anywhere."""
    tp, device, n, hidden = rank.comm(), rank.device, rank.world_size, 4096
    checks = []
    for rows, skip in ((4096, 0), (33, 1), (33, 3)):
        parts = inputs(n, rows * hidden, torch.bfloat16, rows, device)
        (before,) = inputs(1, rows * hidden, torch.bfloat16, 6, device)
        weight = torch.ones(hidden, dtype=torch.bfloat16, device=device)
        x, r = (
            torch.empty(rows * hidden + skip, dtype=torch.bfloat16, device=device)[skip:].copy_(t).view(rows, hidden)
            for t in (parts[rank.rank], before)
        )
        wanted_norm, wanted = add_rms_norm(reduced(parts).view(rows, hidden), before.view(rows, hidden), weight, 1e-5)
        norm, residual = tp.all_reduce_rms_norm(x, r, weight, 1e-5)
        expect((rows, skip), residual, wanted)
        assert ulps(norm, wanted_norm) <= 2.0
        tp.all_reduce_rms_norm_(x, r, weight, 1e-5)
        expect((rows, skip, "in place"), r, wanted)
        expect((rows, skip, "in place"), x, norm)
        checks += [checksum(norm), checksum(residual)]
    return checks


@pytest.mark.parametrize("size", sizes())
def test_the_norm_of_more_rows_than_one_kernel_takes_and_of_misaligned_tensors(world: World) -> None:
    first, *others = world.run(large_norm)
    assert all(other == first for other in others)


def moves(rank: Rank, name: str) -> None:
    tp, dtype, device, n = rank.comm(), DTYPES[name], rank.device, rank.world_size
    for rows in (1, 3, 16, 1000, 262_147):
        parts = [p.view(n * rows, 2) for p in inputs(n, 2 * n * rows, dtype, rows, device)]
        parts[0][0, 0] = float("nan")
        mine, total = parts[rank.rank], reduced(parts)
        gathered = tp.all_gather(mine)
        assert torch.equal(bits(gathered), bits(torch.cat(parts))), (name, rows, "all_gather")
        expect((name, rows, "reduce_scatter"), tp.reduce_scatter(mine), total.chunk(n)[rank.rank])
        for src in range(n):
            x = mine.clone()
            assert tp.broadcast(x, src) is x
            assert torch.equal(bits(x), bits(parts[src])), (name, rows, "broadcast", src)
        # Views that begin anywhere and skip columns.
        wide = torch.zeros(n * rows, 5, dtype=dtype, device=device)[:, 1:3].copy_(mine)
        assert torch.equal(bits(tp.all_gather(wide)), bits(gathered)), (name, rows, "all_gather of a view")
        tp.broadcast(wide, n - 1)
        assert torch.equal(bits(wide), bits(parts[n - 1])), (name, rows, "broadcast into a view")
        odd = torch.zeros(2 * n * rows + 1, dtype=dtype, device=device)[1:].copy_(mine.flatten())
        expect((name, rows, "reduce_scatter, misaligned"), tp.reduce_scatter(odd), total.flatten().chunk(n)[rank.rank])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", sizes())
def test_gather_scatter_and_broadcast_move_every_bit_to_its_place(world: World, name: str) -> None:
    world.run(moves, name)


def late(rank: Rank, culprit: int) -> float:
    """How long a barrier took where one rank comes 0.5 s late."""
    import time

    tp = rank.comm()
    tp.barrier()
    if rank.rank == culprit:
        time.sleep(0.5)
    before = time.monotonic()
    tp.barrier()
    return time.monotonic() - before


@pytest.mark.parametrize("size", sizes(most=3))
def test_a_barrier_waits_for_the_last_rank(world: World, size: int) -> None:
    took = world.run(late, size - 1)
    # A rank that was let through before the last came would have waited for nearly nothing.
    assert all(t > 0.1 for t in took[:-1]), took


def two_at_once(rank: Rank) -> None:
    """Calls of two communicators with streams of their own, neither of which waits for the other."""
    a, b, n = rank.comm(), rank.comm(algorithm="two_shot_push"), rank.world_size
    one, other = torch.cuda.Stream(rank.device), torch.cuda.Stream(rank.device)
    torch.cuda.synchronize()
    results = []
    for step in range(50):
        with torch.cuda.stream(one):
            x = a.all_reduce(torch.full((5000,), float(step + rank.rank), device=rank.device))
        with torch.cuda.stream(other):
            y = b.all_reduce(torch.full((70_000,), float(2 * step + rank.rank), device=rank.device))
        results.append((step, x, y))
    torch.cuda.synchronize()
    ranks = n * (n - 1) / 2
    for step, x, y in results:
        assert bool((x == n * step + ranks).all()) and bool((y == 2 * n * step + ranks).all()), step


def sub_groups(rank: Rank) -> None:
    """Groups of one, of two ranks in the other order, and of all, side by side."""
    n, device = rank.world_size, rank.device
    everyone = rank.comm()
    pair = [[0, 1], [2, 3]][rank.rank // 2] if n == 4 else [1, 0]
    if rank.rank in pair:
        inner = rank.form(f"pair_{min(pair)}", pair)
        assert inner.ranks == tuple(pair)
        parts = inputs(n, 10_001, torch.bfloat16, 3, device)
        for _ in range(3):
            expect("pair", inner.all_reduce(parts[rank.rank]), reduced([parts[r] for r in pair]))
            gathered = inner.all_gather(parts[rank.rank])
            assert torch.equal(gathered, torch.cat([parts[r] for r in pair])), "the order is that of the list"
    expect("all", everyone.all_reduce(torch.ones(9, device=device)), torch.full((9,), float(n), device=device))
    if rank.rank in pair:
        inner.close()


@pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="kernels of two communicators of one process share its part of the GPU"
)
@pytest.mark.parametrize("size", sizes(most=2))
def test_two_communicators_work_at_once(world: World) -> None:
    world.run(two_at_once)


@pytest.mark.parametrize("size", sizes())
def test_sub_groups_work_beside_the_whole_group(world: World) -> None:
    world.run(sub_groups)
