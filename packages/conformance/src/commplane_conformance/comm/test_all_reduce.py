"""All-reduce: every op and dtype, at every size, in any layout, in place and out of place."""

from __future__ import annotations

import torch

from commplane.api import Capability, Collective
from commplane_conformance.cases import GROW_AND_SHRINK, sizes
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.oracle import expect, expect_bits, inputs, layouts
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World

pytestmark = [needs(Capability.ALL_REDUCE)]


def reduce_sizes(rank: Rank, name: str, op: str, counts: tuple[int, ...]) -> None:
    """Contiguous tensors of each size, in place and out of place."""
    dtype = getattr(torch, name)
    for seed, count in enumerate(counts):
        parts = inputs(rank.world_size, [count], dtype, seed)
        mine = rank.put(parts[rank.rank])
        if not rank.serves(rank.comm, Collective.ALL_REDUCE, mine.nbytes, dtype, op):
            continue
        out = rank.comm.all_reduce(mine, op)
        expect(f"all_reduce {op} of {count} {name}, out of place", out, parts, op)
        expect_bits(f"the input of all_reduce of {count} {name}", mine, parts[rank.rank])
        assert count == 0 or out.data_ptr() != mine.data_ptr(), "all_reduce gave its own input back: it has to be a new tensor"
        again = rank.comm.all_reduce_(mine, op)
        assert again is mine, "all_reduce_ has to return the tensor that it was given"
        expect(f"all_reduce_ {op} of {count} {name}, in place", mine, parts, op)


@clause("S2", "S5", "S6", "S8", "S53")
def test_values(world: World, dtype: str, op: str) -> None:
    world.run(reduce_sizes, dtype, op, sizes(world.subject.full))


@clause("S2", "S53")
def test_sizes_that_grow_and_shrink(world: World, dtype: str) -> None:
    for op in world.subject.ops(dtype):
        world.run(reduce_sizes, dtype, op, GROW_AND_SHRINK)


def reduce_layouts(rank: Rank, name: str, op: str) -> None:
    """Tensors that are not contiguous, or do not begin where memory is aligned."""
    dtype = getattr(torch, name)
    for seed, shape in enumerate([(3, 5), (1, 1), (67, 31)]):
        parts = inputs(rank.world_size, shape, dtype, seed)
        for layout, mine in layouts(rank.put(parts[rank.rank])):
            if not rank.serves(rank.comm, Collective.ALL_REDUCE, mine.nbytes, dtype, op):
                continue
            what = f"{op} of {name} {shape}, {layout}"
            strides = mine.stride()
            expect(f"all_reduce {what}, out of place", rank.comm.all_reduce(mine, op), parts, op)
            expect_bits(f"the input of all_reduce {what}", mine, parts[rank.rank])
            rank.comm.all_reduce_(mine, op)
            expect(f"all_reduce_ {what}, in place", mine, parts, op)
            assert mine.stride() == strides, f"all_reduce_ {what} changed the strides of its tensor"


@clause("S2", "S7")
def test_any_layout(world: World, dtype: str, op: str) -> None:
    world.run(reduce_layouts, dtype, op)


def reduce_shapes(rank: Rank, name: str) -> None:
    """Scalars, many dimensions, and dimensions of 0."""
    dtype = getattr(torch, name)
    for seed, shape in enumerate([(), (1, 1, 1), (2, 3, 4, 5), (0, 7), (4, 0)]):
        parts = inputs(rank.world_size, shape, dtype, seed)
        mine = rank.put(parts[rank.rank])
        if rank.serves(rank.comm, Collective.ALL_REDUCE, mine.nbytes, dtype):
            expect(f"all_reduce of {name} {shape}", rank.comm.all_reduce(mine), parts, "sum")


@clause("S7", "S8")
def test_any_shape(world: World, dtype: str) -> None:
    world.run(reduce_shapes, dtype)


def neighbours(rank: Rank, name: str) -> None:
    """A tensor in the middle of a larger one: what lies around it is not touched."""
    dtype = getattr(torch, name)
    for count in (1, 3, 17, 1000, 40_007):
        parts = inputs(rank.world_size, [count], dtype, count)
        around = torch.full((count + 128,), 3, dtype=dtype, device=rank.device)
        around[64 : 64 + count] = rank.put(parts[rank.rank])
        if not rank.serves(rank.comm, Collective.ALL_REDUCE, count * dtype.itemsize, dtype):
            continue
        rank.comm.all_reduce_(around[64 : 64 + count])
        expect(f"all_reduce_ of {count} {name} in the middle of a tensor", around[64 : 64 + count], parts, "sum")
        outside = torch.cat([around[:64], around[64 + count :]])
        assert bool((outside == 3).all()), f"all_reduce_ of {count} {name} wrote beside its tensor"


@clause("S2")
def test_nothing_is_written_beside_the_tensor(world: World, dtype: str) -> None:
    world.run(neighbours, dtype)


def reuse_input(rank: Rank, rounds: int) -> None:
    """The input is overwritten as soon as the call returns, while another rank has not begun to read its own result."""
    device, n = rank.device, rank.world_size
    for count in (16, 5000, 100_000):
        if not rank.serves(rank.comm, Collective.ALL_REDUCE, count * 4, torch.float32):
            continue
        for i in range(rounds):
            mine = torch.full((count,), float(i + rank.rank), device=device)
            out = rank.comm.all_reduce(mine)
            mine.fill_(-1e9)
            if i % n == rank.rank:  # a rank that is slower than the others, each in its turn
                torch.zeros(50_000).exp_()
            wanted = float(n * i + n * (n - 1) // 2)
            bad = (out != wanted).nonzero()
            assert not len(bad), (
                f"all_reduce of {count} float32, call {i}: element {int(bad[0])} is {out[int(bad[0])].item()}, wanted {wanted}: "
                f"an input was overwritten right after its call returned, and another rank still read it"
            )


@clause("S10")
@needs_dtype("float32")
def test_the_input_belongs_to_the_caller_when_the_call_returns(world: World) -> None:
    world.run(reuse_input, 200 if world.subject.full else 30)


def results_are_own(rank: Rank) -> None:
    """Results of earlier calls stay as they were while later calls run."""
    for count in (8, 30_000):
        kept = []
        for i in range(6):
            parts = inputs(rank.world_size, [count], torch.float32, i)
            kept.append((parts, rank.comm.all_reduce(rank.put(parts[rank.rank]))))
        for i, (parts, out) in enumerate(kept):
            expect(f"the result of call {i} of 6, after all of them", out, parts, "sum")


@clause("S2")
@needs_dtype("float32")
def test_results_share_no_memory(world: World) -> None:
    world.run(results_are_own)


def reduce_leaf(rank: Rank) -> None:
    """Tensors that require grad."""
    n = rank.world_size
    leaf = torch.full((5,), float(rank.rank), device=rank.device, requires_grad=True)
    out = rank.comm.all_reduce(leaf)
    assert not out.requires_grad, "the result of a collective must not require grad"
    rank.comm.all_reduce_(leaf)
    assert leaf.requires_grad and leaf.is_leaf, "all_reduce_ of a leaf has to leave it one"
    assert leaf.detach().tolist() == out.tolist() == [n * (n - 1) / 2] * 5


@clause("S11")
@needs_dtype("float32")
def test_collectives_are_outside_of_autograd(world: World) -> None:
    world.run(reduce_leaf)
