"""Which bits come out: the same on every rank and from run to run, and what special values become."""

from __future__ import annotations

import hashlib

import torch

from commplane.api import Capability, Collective, Numerics
from commplane_conformance.marks import clause, needs, needs_dtype, numerics
from commplane_conformance.oracle import expect_bits, inputs, special_values
from commplane_conformance.rank import Rank, Skip
from commplane_conformance.worlds import World

pytestmark = [needs(Capability.ALL_REDUCE)]

_COUNTS = (1, 5, 64, 1023, 30_011, 300_000)


def digest(tensor: torch.Tensor) -> str:
    """One text for the bits of a tensor."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def reduce_twice(rank: Rank, name: str, op: str) -> list[str]:
    """The bits of each size, checked to be the same in three calls and in a second communicator."""
    dtype, out = getattr(torch, name), []
    other = rank.form("conformance_bits")
    for seed, count in enumerate(_COUNTS):
        mine = rank.put(inputs(rank.world_size, [count], dtype, seed)[rank.rank])
        if not rank.serves(rank.comm, Collective.ALL_REDUCE, mine.nbytes, dtype, op):
            continue
        first = rank.comm.all_reduce(mine, op)
        for what, again in (
            ("a second time", rank.comm.all_reduce(mine, op)),
            ("in place", rank.comm.all_reduce_(mine.clone(), op)),
            ("on another communicator", other.all_reduce(mine, op)),
        ):
            expect_bits(f"all_reduce {op} of {count} {name}, {what}", again, first.cpu())
        out.append(digest(first))
    other.close()
    return out


@clause("S13")
@numerics(Numerics.RANK_ORDER)
def test_bits_are_equal_on_all_ranks_and_in_all_runs(world: World, dtype: str, op: str) -> None:
    found = world.run(reduce_twice, dtype, op)
    for r, bits in enumerate(found):
        assert bits == found[0], (
            f"all_reduce {op} of {dtype}: the bits on rank {r} are not those on rank 0, for {_COUNTS} elements"
        )


def position(rank: Rank, name: str) -> None:
    """The same numbers as a message of their own and inside a larger one, where another chunk or rank may add them."""
    dtype = getattr(torch, name)
    for offset, whole in ((0, 300), (37, 5000), (70_001, 200_000)):
        parts = inputs(rank.world_size, [whole], dtype, whole)
        mine = rank.put(parts[rank.rank])
        large = rank.comm.all_reduce(mine)[offset : offset + 200]
        small = rank.comm.all_reduce(mine[offset : offset + 200].clone())
        expect_bits(f"200 {name} at {offset} of {whole} and alone", large, small.cpu())


@clause("S13")
@numerics(Numerics.RANK_ORDER)
def test_the_order_of_additions_does_not_depend_on_the_size(world: World, float_dtype: str) -> None:
    world.run(position, float_dtype)


def scatter_bits(rank: Rank, name: str) -> None:
    """A rank's part of a reduce-scatter, and the same part of an all-reduce."""
    dtype, n = getattr(torch, name), rank.world_size
    for count in (5, 1000, 70_001):
        mine = rank.put(inputs(n, [n * count], dtype, count)[rank.rank])
        if rank.serves(rank.comm, Collective.REDUCE_SCATTER, mine.nbytes, dtype):
            wanted = rank.comm.all_reduce(mine).cpu().chunk(n)[rank.rank]
            expect_bits(f"reduce_scatter of {n * count} {name}, beside the all_reduce", rank.comm.reduce_scatter(mine), wanted)


@clause("S13")
@numerics(Numerics.RANK_ORDER)
@needs(Capability.REDUCE_SCATTER)
def test_a_reduce_scatter_adds_in_the_order_of_an_all_reduce(world: World, float_dtype: str) -> None:
    world.run(scatter_bits, float_dtype)


def in_group_order(rank: Rank) -> None:
    """Numbers of which only the order of ranks gives one sum: a large one, its negative, and small ones that it swallows."""
    n = rank.world_size
    values = [1.0, 2.0**30, -(2.0**30), *(2.0**-3 for _ in range(n - 3))][:n]
    for order in (list(range(n)), list(reversed(range(n)))):
        comm = rank.form(f"conformance_order_{order[0]}", order)
        wanted = torch.tensor(values[order[0]], dtype=torch.float32)
        for r in order[1:]:
            wanted = wanted + torch.tensor(values[r], dtype=torch.float32)
        for count in (1, 999, 100_000):
            out = comm.all_reduce(torch.full((count,), values[rank.rank], device=rank.device))
            expect_bits(f"the sum of {values} in the order of ranks {order}, {count} float32", out, wanted.expand(count))
        comm.close()


@clause("S13")
@numerics(Numerics.RANK_ORDER)
@needs_dtype("float32")
def test_sums_are_in_the_order_of_group_ranks(world: World) -> None:
    world.run(in_group_order)


def special(rank: Rank, name: str, op: str) -> None:
    """Each special value with each other one."""
    dtype = getattr(torch, name)
    parts = special_values(rank.world_size, dtype)
    out = rank.comm.all_reduce(rank.put(parts[rank.rank]), op).cpu()
    exact = torch.stack([p.double() for p in parts])
    wanted = exact.sum(0) if op == "sum" else exact.mean(0) if op == "avg" else exact.amin(0) if op == "min" else exact.amax(0)
    # Float64 has room for what a narrower dtype rounds to 0; of denormals only their sum is asked to be exact.
    rounded = wanted.to(dtype)
    same = (out == rounded) | (out.isnan() & rounded.isnan())
    if op == "avg":
        same |= (out.double() - wanted).abs() <= torch.finfo(dtype).smallest_normal
    if not bool(same.all()):
        i = int((~same).nonzero()[0])
        raise AssertionError(
            f"all_reduce {op} of {name}: {[p[i].item() for p in parts]} gave {out[i].item()}, wanted {rounded[i].item()}"
        )


@clause("S54")
def test_nan_infinity_and_denormals_in_sums(world: World, float_dtype: str) -> None:
    for op in ("sum", "avg"):
        if op in world.subject.spec.ops:
            world.run(special, float_dtype, op)


@clause("S15")
@numerics(Numerics.RANK_ORDER)
def test_nan_wins_in_min_and_max(world: World, float_dtype: str) -> None:
    for op in ("min", "max"):
        if op in world.subject.spec.ops:
            world.run(special, float_dtype, op)


def negative_zero(rank: Rank, name: str) -> None:
    """The sum of negative zeros, at sizes that vector code and its tail see."""
    dtype = getattr(torch, name)
    for count in (1, 17, 4099):
        out = rank.comm.all_reduce(torch.full((count,), -0.0, dtype=dtype, device=rank.device))
        expect_bits(f"the sum of {count} {name} of -0.0", out, torch.full((count,), -0.0, dtype=dtype))


@clause("S54")
def test_the_sum_of_negative_zeros_is_negative_zero(world: World, float_dtype: str) -> None:
    world.run(negative_zero, float_dtype)


def kept_bits(rank: Rank, name: str) -> None:
    """Random bits, every kind of NaN among them."""
    if not {Capability.ALL_GATHER, Capability.BROADCAST} & set(rank.spec.capabilities):
        raise Skip(f"{rank.job.backend} declares neither all_gather nor broadcast")
    dtype = getattr(torch, name)
    generator = torch.Generator().manual_seed(7)
    rows = [
        torch.randint(0, 256, (4099 * dtype.itemsize,), dtype=torch.uint8, generator=generator) for _ in range(rank.world_size)
    ]
    mine = rank.put(rows[rank.rank].view(dtype))
    if Capability.ALL_GATHER in rank.spec.capabilities:
        expect_bits(f"all_gather of {name}", rank.comm.all_gather(mine), torch.cat(rows).view(dtype))
    if Capability.BROADCAST in rank.spec.capabilities:
        expect_bits(f"broadcast of {name}", rank.comm.broadcast(mine, rank.world_size - 1), rows[-1].view(dtype))


@clause("S54")
def test_what_is_only_moved_keeps_every_bit(world: World, dtype: str) -> None:
    world.run(kept_bits, dtype)
