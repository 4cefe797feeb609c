"""Programs drawn at random: collectives of all kinds, waited for at once, later or never, on views that others are cut from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from c10d_world import World

pytestmark = pytest.mark.timeout(120)

KINDS = ["all_reduce", "coalesced", "all_gather", "into", "scatter", "broadcast", "functional", "barrier", "object"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.int16]
SUMMED = {torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32}
CUTS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t,
    lambda t: t.view(2, -1).t(),
    lambda t: t[::2],
    lambda t: t.view(4, -1)[:, 1:],
    lambda t: t[3:],
    lambda t: t[:0],
]

Check = Callable[[], None]


def numbers(seed: int, step: int, rank: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """What a rank has in a step, as every rank knows."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step * 101 + rank)
    return torch.randint(0, 5, (count,), generator=generator).to(dtype)


def all_of(*checks: Check) -> Check:
    def check() -> None:
        for part in checks:
            part()

    return check


def one(rng: random.Random, seed: int, step: int, rank: int, group: Any) -> tuple[Any, Check]:
    """One collective: its work or None, and what has to hold once it has ended. The draws are the same on all ranks."""
    n = dist.get_world_size()
    dtype, cut, count = rng.choice(DTYPES), rng.choice(CUTS), rng.choice([8, 24, 4096, 40_000])
    later = rng.random() < 0.6
    tensor = cut(numbers(seed, step, rank, dtype, count))
    all_ = [cut(numbers(seed, step, r, dtype, count)) for r in range(n)]
    total = torch.stack([t.to(torch.float64) for t in all_]).sum(0).to(dtype)
    kind = rng.choice(KINDS)
    src = rng.randrange(n)

    def is_(found: torch.Tensor, wanted: torch.Tensor) -> Check:
        def check() -> None:
            assert torch.equal(found, wanted), (seed, step, kind, dtype, later, found, wanted)

        return check

    if kind == "barrier":
        return dist.barrier(async_op=later), lambda: None
    if kind == "object":
        said: list[Any] = [None] * n
        dist.all_gather_object(said, (step, rank))
        return None, lambda: None if said == [(step, r) for r in range(n)] else pytest.fail(f"{seed} {step} {said}")
    if kind == "broadcast":
        return dist.broadcast(tensor, src, async_op=later), is_(tensor, all_[src])
    if kind == "all_gather":
        outs = [torch.empty_like(tensor) for _ in range(n)]
        return dist.all_gather(outs, tensor, async_op=later), all_of(*(is_(o, a) for o, a in zip(outs, all_, strict=True)))
    if kind == "into":
        out = torch.empty(n * tensor.numel(), dtype=dtype)
        work = dist.all_gather_into_tensor(out, tensor.contiguous(), async_op=later)
        return work, is_(out, torch.cat([a.reshape(-1) for a in all_]))
    if dtype not in SUMMED:
        return dist.broadcast(tensor, src, async_op=later), is_(tensor, all_[src])
    if kind == "coalesced":
        other = tensor.contiguous().clone()
        work = group.allreduce_coalesced([tensor, other, tensor])
        return work, all_of(is_(tensor, total), is_(other, total))
    if kind == "scatter":
        flat, whole = tensor.reshape(-1), total.reshape(-1)
        flat, whole = flat[: len(flat) // n * n].contiguous(), whole[: len(flat) // n * n]
        out = torch.empty(len(flat) // n, dtype=dtype)
        return dist.reduce_scatter_tensor(out, flat, async_op=later), is_(out, whole.chunk(n)[rank] if len(flat) else whole)
    if kind == "functional":
        out = funcol.all_reduce(tensor, "sum", group)
        return None, lambda: is_(funcol.wait_tensor(out), total)()
    return dist.all_reduce(tensor, async_op=later), is_(tensor, total)


def run(rank: int, seed: int, steps: int) -> int:
    rng, mine = random.Random(seed), random.Random(seed + rank + 1)
    group = dist.group.WORLD
    pending: list[tuple[Any, Check]] = []
    for step in range(steps):
        work, check = one(rng, seed, step, rank, group)
        if work is None:
            check()
        else:
            pending.append((work, check))
        # Each rank waits for what it likes when it likes.
        while pending and mine.random() < 0.4:
            work, check = pending.pop(mine.randrange(len(pending)))
            if mine.random() < 0.3:
                work.get_future().wait()
            assert work.wait()
            check()
    for work, check in pending:
        work.wait()
        check()
    return steps


def test_a_program_drawn_at_random_has_the_results_that_it_should(pair: World) -> None:
    assert pair.run(run, 1, 250) == [250, 250]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_programs_drawn_at_random_have_the_results_that_they_should(four: World, seed: int) -> None:
    assert four.run(run, seed, 400) == [400] * 4
