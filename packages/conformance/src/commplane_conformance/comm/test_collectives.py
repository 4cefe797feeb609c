"""All-gather, reduce-scatter, broadcast and barrier."""

from __future__ import annotations

import time

import torch

from commplane.api import Capability, Collective
from commplane_conformance.cases import sizes
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.oracle import expect, expect_bits, inputs, layouts
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World


def gather(rank: Rank, name: str, counts: tuple[int, ...]) -> None:
    """Rows of every size, and a tensor that is not contiguous."""
    dtype = getattr(torch, name)
    for seed, count in enumerate(counts):
        for shape in ([count], [3, count]) if count < 5000 else ([count],):
            parts = inputs(rank.world_size, shape, dtype, seed)
            mine = rank.put(parts[rank.rank])
            if rank.serves(rank.comm, Collective.ALL_GATHER, mine.nbytes, dtype):
                expect_bits(f"all_gather of {name} {shape}", rank.comm.all_gather(mine), torch.cat(parts))
                expect_bits(f"the input of all_gather of {name} {shape}", mine, parts[rank.rank])
    parts = inputs(rank.world_size, [5, 7], dtype, 99)
    for layout, mine in layouts(rank.put(parts[rank.rank])):
        if rank.serves(rank.comm, Collective.ALL_GATHER, mine.nbytes, dtype):
            expect_bits(f"all_gather of {name} (5, 7), {layout}", rank.comm.all_gather(mine), torch.cat(parts))


@clause("S3", "S6", "S7", "S8")
@needs(Capability.ALL_GATHER)
def test_all_gather(world: World, dtype: str) -> None:
    world.run(gather, dtype, sizes(world.subject.full))


def scatter(rank: Rank, name: str, op: str, counts: tuple[int, ...]) -> None:
    """Parts of every size."""
    dtype, n = getattr(torch, name), rank.world_size
    for seed, count in enumerate(counts):
        for shape in ([n * count], [2 * n, count]) if count < 5000 else ([n * (count // n)],):
            parts = inputs(n, shape, dtype, seed)
            mine = rank.put(parts[rank.rank])
            if not rank.serves(rank.comm, Collective.REDUCE_SCATTER, mine.nbytes, dtype, op):
                continue
            wanted = [p.chunk(n)[rank.rank] if p.numel() else p[: p.shape[0] // n] for p in parts]
            expect(f"reduce_scatter {op} of {name} {shape}", rank.comm.reduce_scatter(mine, op), wanted, op)
            expect_bits(f"the input of reduce_scatter of {name} {shape}", mine, parts[rank.rank])
    parts = inputs(n, [2 * n, 7], dtype, 99)
    for layout, mine in layouts(rank.put(parts[rank.rank])):
        if rank.serves(rank.comm, Collective.REDUCE_SCATTER, mine.nbytes, dtype, op):
            wanted = [p.chunk(n)[rank.rank] for p in parts]
            expect(f"reduce_scatter {op} of {name}, {layout}", rank.comm.reduce_scatter(mine, op), wanted, op)


@clause("S3", "S5", "S6", "S7", "S8", "S53")
@needs(Capability.REDUCE_SCATTER)
def test_reduce_scatter(world: World, dtype: str, op: str) -> None:
    world.run(scatter, dtype, op, sizes(world.subject.full))


def broadcast(rank: Rank, name: str, counts: tuple[int, ...]) -> None:
    """From every rank, at every size, in any layout."""
    dtype = getattr(torch, name)
    for src in range(rank.world_size):
        for count in counts:
            parts = inputs(rank.world_size, [count], dtype, src)
            mine = rank.put(parts[rank.rank])
            if rank.serves(rank.comm, Collective.BROADCAST, mine.nbytes, dtype):
                assert rank.comm.broadcast(mine, src) is mine, "broadcast has to return the tensor that it was given"
                expect_bits(f"broadcast of {count} {name} from {src}", mine, parts[src])
        parts = inputs(rank.world_size, [5, 7], dtype, src)
        for layout, mine in layouts(rank.put(parts[rank.rank])):
            if rank.serves(rank.comm, Collective.BROADCAST, mine.nbytes, dtype):
                rank.comm.broadcast(mine, src)
                expect_bits(f"broadcast of {name} from {src}, {layout}", mine, parts[src])


@clause("S4", "S6", "S7", "S8")
@needs(Capability.BROADCAST)
def test_broadcast(world: World, dtype: str) -> None:
    world.run(broadcast, dtype, sizes(world.subject.full))


def in_a_row(rank: Rank, collective: Collective) -> None:
    """Calls whose inputs are overwritten at once, while another rank is slow; the results are looked at after all of them."""
    n, device, kept = rank.world_size, rank.device, []
    for count in (8, 20_000):
        if not rank.serves(rank.comm, collective, 4 * count, torch.float32):
            continue
        for i in range(12):
            mine, src = torch.full((n * count,), float(10 * i + rank.rank), device=device), i % n
            if collective is Collective.ALL_GATHER:
                out = rank.comm.all_gather(mine[:count])
                wanted = torch.arange(n).repeat_interleave(count).float() + 10 * i
            elif collective is Collective.REDUCE_SCATTER:
                out = rank.comm.reduce_scatter(mine)
                wanted = torch.full((count,), float(10 * i * n + n * (n - 1) // 2))
            else:
                out = rank.comm.broadcast(mine, src)
                wanted = torch.full((n * count,), float(10 * i + src))
            if collective is not Collective.BROADCAST or rank.rank == src:
                mine.fill_(-1.0)
            if collective is not Collective.BROADCAST or rank.rank != src:
                kept.append((f"{collective} of {count} float32, call {i} of 12, after all of them", out, wanted))
            if (i + 1) % n == rank.rank:
                time.sleep(0.002)
    for what, out, wanted in kept:
        expect_bits(what, out, wanted)


@clause("S3", "S10")
@needs(Capability.ALL_GATHER)
@needs_dtype("float32")
def test_what_all_gather_was_given_and_gave_belongs_to_the_caller(world: World) -> None:
    world.run(in_a_row, Collective.ALL_GATHER)


@clause("S3", "S10")
@needs(Capability.REDUCE_SCATTER)
@needs_dtype("float32")
def test_what_reduce_scatter_was_given_and_gave_belongs_to_the_caller(world: World) -> None:
    world.run(in_a_row, Collective.REDUCE_SCATTER)


@clause("S4", "S10")
@needs(Capability.BROADCAST)
@needs_dtype("float32")
def test_the_source_of_a_broadcast_has_its_tensor_back(world: World) -> None:
    world.run(in_a_row, Collective.BROADCAST)


def meet(rank: Rank, late: int) -> tuple[float, float]:
    """When this rank came to the barrier, and when it left."""
    if rank.rank == late:
        time.sleep(0.2)
    came = time.monotonic()
    rank.comm.barrier()
    return came, time.monotonic()


@clause("S4")
@needs(Capability.BARRIER)
def test_nobody_leaves_a_barrier_before_all_have_come(world: World) -> None:
    for late in range(world.size):
        times = world.run(meet, late)
        last = max(came for came, _ in times)  # the clock is the machine's, so it is the same for all ranks
        for r, (_, left) in enumerate(times):
            assert left >= last, f"rank {r} left the barrier {last - left:.6f} s before rank {late} came to it"
