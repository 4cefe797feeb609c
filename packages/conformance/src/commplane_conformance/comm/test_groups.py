"""Which ranks take part: sub-groups, orthogonal and overlapping groups, ranks in another order, communicators side by side."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from commplane.api import Capability, Collective
from commplane.runtime import Communicator
from commplane_conformance.marks import at_least, clause, needs, needs_dtype
from commplane_conformance.oracle import expect_bits
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World

pytestmark = [needs(Capability.ALL_REDUCE), needs_dtype("float32")]


def who_took_part(rank: Rank, comm: Communicator, counts: Sequence[int] = (1, 33, 20_000, 300_000)) -> None:
    """Each rank adds a power of two of its own, so the sum says which ranks were added, and how often."""
    for count in counts:
        mine = torch.full((count,), float(1 << rank.rank), device=rank.device)
        if not rank.serves(comm, Collective.ALL_REDUCE, mine.nbytes, torch.float32):
            continue
        found = comm.all_reduce(mine)
        wanted = float(sum(1 << r for r in comm.ranks))
        bad = (found != wanted).nonzero()
        assert not len(bad), (
            f"all_reduce of {count} float32 over ranks {list(comm.ranks)}: element {int(bad[0])} is "
            f"{found[int(bad[0])].item():g}; "
            f"rank r adds 2**r, so wanted {wanted:g}: other ranks were added than those of the group"
        )


def in_group_order(rank: Rank, comm: Communicator) -> None:
    """What depends on the group rank: the parts of a gather and of a scatter, the source of a broadcast."""
    ranks, n = comm.ranks, comm.world_size
    caps = rank.spec.capabilities
    for count in (1, 1000, 50_000):
        if Capability.ALL_GATHER in caps:
            out = comm.all_gather(torch.full((count,), float(rank.rank), device=rank.device))
            wanted = torch.tensor([float(r) for r in ranks]).repeat_interleave(count)
            expect_bits(f"all_gather of {count} float32 over ranks {list(ranks)}", out, wanted)
        if Capability.REDUCE_SCATTER in caps:
            out = comm.reduce_scatter(torch.arange(n, dtype=torch.float32, device=rank.device).repeat_interleave(count))
            wanted = torch.full((count,), float(n * comm.rank))
            expect_bits(f"reduce_scatter of {n * count} float32 over ranks {list(ranks)}", out, wanted)
        if Capability.BROADCAST in caps:
            for src in range(n):
                out = comm.broadcast(torch.full((count,), float(rank.rank), device=rank.device), src)
                wanted = torch.full((count,), float(ranks[src]))
                expect_bits(f"broadcast from group rank {src} over ranks {list(ranks)}", out, wanted)


def served(world: World, groups: list[list[int]]) -> list[list[int]]:
    """Those of `groups` that are as large as the backend declares; the test is skipped where none is."""
    least = world.subject.spec.min_world_size
    kept = [g for g in groups if len(g) >= least]
    if not kept:
        pytest.skip(f"{world.subject.name} declares that it serves groups of {least} ranks or more")
    return kept


def one_group(rank: Rank, ranks: list[int]) -> None:
    """A group that some ranks are not in."""
    if rank.rank in ranks:
        comm = rank.form("conformance_some", ranks)
        who_took_part(rank, comm)
        in_group_order(rank, comm)
        comm.close()
    who_took_part(rank, rank.comm, (5,))


@clause("S1", "S32")
@at_least(3)
def test_a_sub_group_sums_its_own_ranks(world: World) -> None:
    for ranks in served(world, [[0, 1], list(range(1, world.size)), [0, world.size - 1]]):
        world.run(one_group, ranks)


@clause("S3", "S4", "S13")
def test_the_order_of_the_group_is_that_of_its_list(world: World) -> None:
    orders = [list(reversed(range(world.size)))]
    if world.size > 2:
        orders.append([world.size - 1, 0])
    for ranks in served(world, orders):
        world.run(one_group, ranks)


def orthogonal(rank: Rank, rows: list[list[int]], columns: list[list[int]]) -> None:
    """Two groups of equal size on every rank, as tensor and data parallel groups are."""
    if rank.rank >= 4:
        return
    mine = [next(g for g in groups if rank.rank in g) for groups in (rows, columns)]
    row, column = rank.form("conformance_row", mine[0]), rank.form("conformance_column", mine[1])
    for _ in range(3):
        who_took_part(rank, row)
        who_took_part(rank, column)
        in_group_order(rank, row)
        in_group_order(rank, column)
    row.close()
    who_took_part(rank, column)
    column.close()


@clause("S1", "S12")
@at_least(4)
def test_orthogonal_groups_of_equal_size(world: World) -> None:
    rows, columns = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    served(world, [*rows, *columns])
    world.run(orthogonal, rows, columns)


def overlapping(rank: Rank, groups: list[list[int]]) -> None:
    """A rank in the middle is in both."""
    comms = [rank.form(f"conformance_overlap_{i}", g) for i, g in enumerate(groups) if rank.rank in g]
    for _ in range(3):
        for comm in comms:
            who_took_part(rank, comm)
    for comm in comms:
        comm.close()


@clause("S1")
@at_least(3)
def test_overlapping_groups(world: World) -> None:
    world.run(overlapping, served(world, [[0, 1], list(range(1, world.size)), list(range(world.size))]))


def interleaved(rank: Rank, seed: int, calls: int) -> None:
    """Several communicators of the same ranks, called in an order drawn from a seed, with sizes of all kinds."""
    draw = random.Random(seed)
    comms = [rank.comm, *(rank.form(f"conformance_beside_{i}") for i in range(2))]
    n = rank.world_size
    for i in range(calls):
        which, count, in_place = draw.randrange(3), draw.choice([1, 7, 500, 9000, 120_000]), draw.random() < 0.5
        x = torch.full((count,), float(10 * i + rank.rank), device=rank.device)
        out = comms[which].all_reduce_(x) if in_place else comms[which].all_reduce(x)
        wanted = float(10 * i * n + n * (n - 1) // 2)
        bad = (out != wanted).nonzero()
        assert not len(bad), (
            f"call {i}, all_reduce of {count} float32 on communicator {which} of 3: element {int(bad[0])} is "
            f"{out[int(bad[0])].item():g}, wanted {wanted:g}: communicators of the same ranks get in each other's way"
        )
    for comm in comms[1:]:
        comm.close()


@clause("S12")
def test_several_communicators_interleaved(world: World) -> None:
    world.run(interleaved, 1, 400 if world.subject.full else 60)
