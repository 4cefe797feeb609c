"""All-reduce, residual and RMS norm in one call."""

from __future__ import annotations

import torch

from commplane.api import Capability, Collective
from commplane_conformance.marks import clause, needs, since
from commplane_conformance.oracle import expect, expect_bits, expect_norm, inputs, layouts
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World

pytestmark = [needs(Capability.ALL_REDUCE_RMS_NORM), since(1, 1)]

_SHAPES = [(1, 1), (1, 64), (3, 37), (0, 16), (2, 5, 128), (9, 4096), (64, 1000)]


def norms(rank: Rank, name: str) -> None:
    """Every shape, with both kinds of weight, out of place and in place."""
    dtype = getattr(torch, name)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    for seed, shape in enumerate(_SHAPES):
        parts = inputs(rank.world_size, shape, dtype, seed)
        residual = rank.put(inputs(1, shape, dtype, seed + 100)[0])
        weight = rank.put(inputs(1, [shape[-1]], dtype, seed + 200)[0])
        mine = rank.put(parts[rank.rank])
        if not rank.serves(rank.comm, Collective.ALL_REDUCE_RMS_NORM, mine.nbytes, dtype):
            continue
        summed = rank.comm.all_reduce(mine)
        for eps, bias in ((1e-6, 0.0), (1e-3, 1.0)):
            what = f"all_reduce_rms_norm of {name} {shape} with eps {eps} and weight_bias {bias}"
            before = residual.clone()
            norm, total = rank.comm.all_reduce_rms_norm(mine, residual, weight, eps, bias)
            expect_bits(f"the input of {what}", mine, parts[rank.rank])
            expect_bits(f"the residual given to {what}", residual, before)
            # The sum is rounded to the dtype, then the sum with the residual: at most two roundings from the exact one.
            expect(f"the new residual of {what}", total, [*parts, residual.cpu()], "sum")
            if rank.spec.numerics == "rank_order":
                expect_bits(f"the new residual of {what}", total, (summed.to(wide) + residual.to(wide)).to(dtype).cpu())
            expect_norm(what, norm, total, weight, eps, bias)
            inplace, rest = mine.clone(), residual.clone()
            a, b = rank.comm.all_reduce_rms_norm_(inplace, rest, weight, eps, bias)
            assert a is inplace and b is rest, "all_reduce_rms_norm_ has to return the tensors that it was given"
            expect_bits(f"{what}, in place", inplace, norm.cpu())
            expect_bits(f"the new residual of {what}, in place", rest, total.cpu())


@clause("S37")
def test_values(world: World, float_dtype: str) -> None:
    world.run(norms, float_dtype)


def norm_layouts(rank: Rank, name: str) -> None:
    """A tensor and a residual that are not contiguous."""
    dtype = getattr(torch, name)
    parts = inputs(rank.world_size, (6, 40), dtype, 1)
    residual = rank.put(inputs(1, (6, 40), dtype, 2)[0])
    weight = rank.put(inputs(1, [40], dtype, 3)[0])
    wanted = rank.comm.all_reduce_rms_norm(rank.put(parts[rank.rank]), residual, weight)
    for layout, mine in layouts(rank.put(parts[rank.rank])):
        for other, rest in layouts(residual):
            got = rank.comm.all_reduce_rms_norm(mine, rest, weight)
            expect_bits(f"norm of {name}, tensor {layout}, residual {other}", got[0], wanted[0].cpu())
            expect_bits(f"residual of {name}, tensor {layout}, residual {other}", got[1], wanted[1].cpu())


@clause("S37", "S7")
def test_any_layout(world: World, float_dtype: str) -> None:
    world.run(norm_layouts, float_dtype)
