"""Symmetric memory: tensors that every rank maps."""

from __future__ import annotations

import torch

from commplane.api import Capability
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.oracle import expect, expect_bits, inputs
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World

pytestmark = [needs(Capability.SYMMETRIC_MEMORY, Capability.ALL_REDUCE)]


def reduce_symmetric(rank: Rank, name: str) -> None:
    """All of a symmetric tensor and parts of it, the same bits as for an ordinary tensor."""
    dtype = getattr(torch, name)
    for count in (1, 33, 5001, 200_000):
        buffer = rank.comm.empty(count, dtype=dtype)
        assert buffer.shape == (count,) and buffer.dtype is dtype and buffer.device.type == rank.device.type
        for seed, (begin, end) in enumerate([(0, count), (count // 3, count), (1, max(1, count - 1))]):
            parts = inputs(rank.world_size, [end - begin], dtype, seed)
            mine = buffer[begin:end]
            mine.copy_(parts[rank.rank])
            staged = rank.comm.all_reduce(rank.put(parts[rank.rank]))
            what = f"elements {begin} to {end} of {count} symmetric {name}"
            out = rank.comm.all_reduce(mine)
            expect(f"all_reduce of {what}", out, parts, "sum")
            expect_bits(f"the input of all_reduce of {what}", mine, parts[rank.rank])
            rank.comm.all_reduce_(mine)
            expect(f"all_reduce_ of {what}", mine, parts, "sum")
            if rank.spec.numerics == "rank_order":
                expect_bits(f"all_reduce of {what}, and of an ordinary tensor", out, staged.cpu())


@clause("S17", "S13")
def test_values(world: World, dtype: str) -> None:
    world.run(reduce_symmetric, dtype)


def several(rank: Rank) -> None:
    """Buffers that live at once hold what was put there, and are used in any order."""
    n = rank.world_size
    buffers = [rank.comm.empty(3000, dtype=torch.float32) for _ in range(4)]
    for i, b in enumerate(buffers):
        b.fill_(float(i * 10 + rank.rank))
    for i in (2, 0, 3, 1):
        rank.comm.all_reduce_(buffers[i])
    for i, b in enumerate(buffers):
        wanted = torch.full((3000,), float(i * 10 * n + n * (n - 1) // 2))
        expect_bits(f"symmetric buffer {i} of 4", b, wanted)


@clause("S17")
@needs_dtype("float32")
def test_several_buffers_at_once(world: World) -> None:
    world.run(several)


def outlive(rank: Rank) -> None:
    """A tensor is good after its communicator is closed."""
    comm = rank.form("conformance_memory")
    kept = comm.empty(1000, dtype=torch.float32)
    kept.fill_(float(rank.rank + 1))
    comm.all_reduce_(kept)
    comm.close()
    n = rank.world_size
    expect_bits("a symmetric tensor after its communicator was closed", kept, torch.full((1000,), n * (n + 1) / 2))
    kept.fill_(5.0)
    assert kept.sum().item() == 5000.0


@clause("S18")
@needs_dtype("float32")
def test_memory_outlives_the_communicator(world: World) -> None:
    world.run(outlive)
