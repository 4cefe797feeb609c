"""Every collective of `custom_ar` against an oracle in rank order, bit for bit: dtypes, ops, sizes, layouts, kinds of memory."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from car_oracle import DTYPES, FLOATS, digest, inputs, layouts, ops_of, patterns, reduced, same_bits
from car_threads import run

from commplane.runtime import Communicator, Plane

# Around a vector, a page and the chunk of 4 KiB that the tests set, and far beyond. Each a matrix: the first dimension is cut and
# concatenated. The last is past the size from which more than two ranks go two-shot.
SHAPES = [(12, 0), (0, 5), (12, 1), (12, 3), (12, 85), (12, 86), (24, 43), (12, 1031)]
WORLDS = [2, 3, 4]


def by_name(value: object) -> str:
    return str(value).removeprefix("torch.")


def expanded(value: torch.Tensor) -> torch.Tensor:
    """Twelve times the first row, which is there once: such a tensor can be read and not written."""
    return value[:1].expand(12 if len(value) else 0, -1)


def assert_routed_here(tp: Communicator, dtype: torch.dtype) -> None:
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        assert tp.plan.explain(collective, nbytes=64, dtype=dtype).chosen == "custom_ar", collective


@pytest.mark.parametrize(("world_size", "dtype"), [*product(WORLDS, DTYPES)], ids=by_name)
def test_all_reduce_gives_the_exact_reduction_in_rank_order(world_size: int, dtype: torch.dtype) -> None:
    cases = [(op, inputs(world_size, shape, dtype, seed=i)) for op in ops_of(dtype) for i, shape in enumerate(SHAPES)]

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        assert_routed_here(tp, dtype)
        for op, parts in cases:
            wanted = reduced(parts, op)
            for name, x in layouts(parts[tp.rank]):
                where = f"{op} {list(x.shape)} {name}"
                assert same_bits(tp.all_reduce(x, op), wanted), where
                assert same_bits(x, parts[tp.rank]), f"{where}: out of place changed its input"
                assert tp.all_reduce_(x, op) is x
                assert same_bits(x, wanted), f"{where}, in place"
            assert same_bits(tp.all_reduce(expanded(parts[tp.rank]), op), expanded(wanted)), f"{op} expanded"

    run(world_size, rank_main)


@pytest.mark.parametrize(("world_size", "dtype"), [*product(WORLDS, DTYPES)], ids=by_name)
def test_all_gather_reduce_scatter_and_broadcast_give_exact_results(world_size: int, dtype: torch.dtype) -> None:
    cases = [inputs(world_size, shape, dtype, seed=i) for i, shape in enumerate(SHAPES)]

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for i, parts in enumerate(cases):
            mine, src = parts[tp.rank], i % world_size
            for name, x in layouts(mine):
                where = f"{list(x.shape)} {name}"
                assert same_bits(tp.all_gather(x), torch.cat(parts)), f"all_gather {where}"
                for op in ops_of(dtype):
                    wanted = reduced(parts, op).chunk(world_size)[tp.rank] if len(mine) else mine
                    assert same_bits(tp.reduce_scatter(x, op), wanted), f"reduce_scatter {op} {where}"
                assert same_bits(x, mine), f"{where}: the input was changed"
                assert tp.broadcast(x, src) is x
                assert same_bits(x, parts[src]), f"broadcast from {src} {where}"
            assert same_bits(tp.all_gather(expanded(mine)), torch.cat([expanded(p) for p in parts]))

    run(world_size, rank_main)


@pytest.mark.parametrize(("world_size", "dtype"), [*product(WORLDS, DTYPES)], ids=by_name)
def test_symmetric_tensors_give_the_same_bits(world_size: int, dtype: torch.dtype) -> None:
    # Elements, and where they begin in the buffer: not always at a cache line.
    cases = [
        (inputs(world_size, (n * world_size,), dtype, seed=n), offset)
        for n, offset in [(0, 5), (1, 0), (100, 3), (257, 1), (1024, 0), (4001, 17)]
    ]

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        buffer = tp.empty(40_000, dtype=dtype)
        for i, (parts, offset) in enumerate(cases):
            mine, src = parts[tp.rank], i % world_size
            x = buffer[offset : offset + len(mine)].copy_(mine)
            assert same_bits(tp.all_gather(x), torch.cat(parts))
            for op in ops_of(dtype):
                wanted = reduced(parts, op)
                assert same_bits(tp.all_reduce(x, op), wanted), f"{op} {len(x)}"
                assert same_bits(tp.reduce_scatter(x, op), wanted.chunk(world_size)[tp.rank] if len(x) else x)
                assert same_bits(x, mine), "the input was changed"
                assert tp.all_reduce_(x, op) is x
                assert same_bits(x, wanted), f"{op} {len(x)}, in place"
                x.copy_(mine)
            assert tp.broadcast(x, src) is x
            assert same_bits(x, parts[src])
            if len(x):  # a view with holes lies in symmetric memory and is staged, on every rank alike
                holes = buffer[0 : 2 * len(x) : 2].copy_(mine)
                assert same_bits(tp.all_reduce_(holes), reduced(parts, "sum"))

    run(world_size, rank_main)


@pytest.mark.parametrize("dtype", FLOATS, ids=by_name)
def test_nan_infinities_zeros_and_denormals_come_out_by_the_rules(dtype: torch.dtype) -> None:
    parts = patterns(3, 5000, dtype, seed=7)

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        symmetric = tp.empty(5000, dtype=dtype).copy_(parts[tp.rank])
        for op in ops_of(dtype):
            wanted = reduced(parts, op)
            for x in (parts[tp.rank], symmetric):
                assert same_bits(tp.all_reduce(x, op), wanted), op
                assert same_bits(tp.reduce_scatter(x[:4998], op), wanted[:4998].chunk(3)[tp.rank]), op
        for x in (parts[tp.rank].clone(), symmetric):  # what is moved and not reduced keeps its bits, those of a NaN too
            assert same_bits(tp.all_gather(x), torch.cat(parts))
            assert same_bits(tp.broadcast(x, src=1), parts[1])

    run(3, rank_main)


def test_sizes_may_grow_and_shrink_and_kinds_may_take_turns() -> None:
    """Steps of all kinds share the ring of slots; what one leaves behind must not show in the next."""
    generator = torch.Generator().manual_seed(11)
    sizes = [int(n) for n in torch.randint(0, 9000, (60,), generator=generator)]

    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        buffer = tp.empty(9000 * 3, dtype=torch.float32)
        seen = []
        for i, n in enumerate(sizes):
            parts = inputs(3, (3 * n,), torch.float32, seed=i)
            mine = parts[tp.rank]
            x = buffer[: 3 * n].copy_(mine) if i % 2 else mine
            kind = i % 5
            if kind == 0:
                got, wanted = tp.all_reduce(x), reduced(parts, "sum")
            elif kind == 1:
                got, wanted = tp.all_gather(x), torch.cat(parts)
            elif kind == 2:
                got, wanted = tp.reduce_scatter(x, "max"), reduced(parts, "max")[n * tp.rank : n * (tp.rank + 1)]
            elif kind == 3:
                got, wanted = tp.broadcast(x.clone(), src=i % 3), parts[i % 3]
            else:
                tp.barrier()
                got, wanted = tp.all_reduce(x, "avg"), reduced(parts, "avg")
            assert same_bits(got, wanted), (i, n)
            if kind != 2:  # the ranks' own parts of a reduce-scatter differ
                seen.append(got)
        return digest(seen)

    assert len(set(run(3, rank_main))) == 1


def test_the_order_of_the_group_and_not_of_the_ranks_decides_the_bits() -> None:
    parts = inputs(3, (5000,), torch.float32, seed=3)
    order = [2, 0, 1]

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        turned = plane.communicator("turned", order)
        forward, other = tp.all_reduce(parts[plane.rank]), turned.all_reduce(parts[plane.rank])
        assert same_bits(forward, reduced(parts, "sum"))
        assert same_bits(other, reduced([parts[r] for r in order], "sum"))
        assert not same_bits(forward, other)
        assert same_bits(turned.all_gather(parts[plane.rank][:4]), torch.cat([parts[r][:4] for r in order]))
        assert same_bits(turned.broadcast(parts[plane.rank].clone(), src=0), parts[2])

    run(3, rank_main)
