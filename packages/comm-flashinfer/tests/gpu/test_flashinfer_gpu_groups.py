"""Groups of equal size beside each other: each sums its own ranks, in the order of its list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from flashinfer_gpu import EPS, Layer, by_flashinfer, check_quantised, formed, groups, how_to, marks
from gpu_numbers import expect
from gpu_ranks import Rank, World

from commplane_flashinfer.patterns import ALL_REDUCE, NORM

pytestmark = marks()

DTYPE = torch.bfloat16
ROWS, COLUMNS = [[0, 1], [2, 3]], [[0, 2], [1, 3]]


def mine(rank: Rank) -> Iterator[tuple[str, list[int]]]:
    for name, parts in (("attention", ROWS), ("experts", COLUMNS)):
        for ranks in parts:
            if rank.rank in ranks:
                yield f"{name}_{ranks[0]}_{ranks[1]}", ranks


def orthogonal(rank: Rank, in_graph: bool) -> None:
    with ExitStack() as stack:
        comms = []
        for name, ranks in mine(rank):
            comm = stack.enter_context(formed(rank, name, ranks))
            assert comm.ranks == tuple(ranks)
            comms.append((comm, ranks))
        got = {}
        layers = {name: Layer(rank, DTYPE, 4, 1024, 11, ranks) for name, ranks in mine(rank)}

        def body() -> None:
            for (comm, ranks), (name, layer) in zip(comms, layers.items(), strict=True):
                assert list(comm.ranks) == ranks
                with by_flashinfer(ALL_REDUCE, NORM):
                    norm = comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
                    got[name] = [comm.all_reduce(layer.mine), *norm]

        body()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        if in_graph:
            with rank.plane.capture(), torch.cuda.graph(graph):
                body()
        for step in range(10):
            for name, ranks in mine(rank):
                fresh = Layer(rank, DTYPE, 4, 1024, step, ranks)
                layers[name].mine.copy_(fresh.mine)
                layers[name].before.copy_(fresh.before)
                layers[name].weight.copy_(fresh.weight)
                layers[name].total = fresh.total
            if in_graph:
                graph.replay()
            else:
                body()
            for name, layer in layers.items():
                total, norm, residual = got[name]
                expect((name, step, "sum"), total, layer.total)
                layer.check((name, step), norm, residual)
        for (comm, _), (name, layer) in zip(comms, layers.items(), strict=True):
            check_quantised(name, comm, layer, how_to("fp8_static", rank.device))
        torch.cuda.synchronize()
        rank.plane.gather(0, what="all are done")


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "in a graph"])
@pytest.mark.parametrize("size", [p for p in groups() if p.values[0] == 4])
def test_orthogonal_groups_of_two_each_sum_their_own_ranks(world: World, in_graph: bool) -> None:
    world.run(orthogonal, in_graph)


def other_order(rank: Rank) -> None:
    """The ranks of a group are those of its list, in its order: sums are rounded in that order."""
    ranks = list(reversed(range(rank.world_size)))
    with formed(rank, "reversed", ranks) as comm:
        for seed in range(4):
            layer = Layer(rank, DTYPE, 4, 1024, seed, ranks)
            with by_flashinfer(NORM):
                got = comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
            layer.check(("reversed", seed), *got)


@pytest.mark.parametrize("size", groups())
def test_a_group_in_another_order_sums_in_that_order(world: World) -> None:
    world.run(other_order)


def side_by_side(rank: Rank) -> None:
    """Two communicators over the same ranks share nothing."""
    with formed(rank, "first") as a, formed(rank, "second") as b:
        for step in range(20):
            layer = Layer(rank, DTYPE, 2, 1024, step)
            for name, comm in (("first", a), ("second", b)):
                with by_flashinfer(NORM):
                    got = comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
                layer.check((name, step), *got)


@pytest.mark.parametrize("size", groups())
def test_two_communicators_over_the_same_ranks_share_nothing(world: World) -> None:
    world.run(side_by_side)
