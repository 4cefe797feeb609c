# SPDX-License-Identifier: Apache-2.0
"""Symmetric tensors on CUDA keep account of their memory: nothing is freed that a peer maps, nothing is freed twice or forgotten.

Threads as ranks, with memory that is not a GPU's.
"""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch
from cuda_fakes import FakeComm, FakeMemory, Pool, context
from gpu_machine import all_of, ranks

from commplane.errors import CommplaneError
from commplane_custom_ar._native import NativeError
from commplane_custom_ar.cuda import symmetric
from commplane_custom_ar.cuda.symmetric import SymmetricMemory

pytestmark = pytest.mark.timeout(60)


class Buffer:
    """Bytes at an address, for numpy; keeps what torch is given alive as a tensor on a GPU would."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.__array_interface__ = dict(holder.__cuda_array_interface__)


def on_cpu(holder: Any, _device: torch.device) -> torch.Tensor:
    import numpy

    return torch.from_numpy(numpy.asarray(Buffer(holder)))


def heap(bootstrap: Any, memory: FakeMemory, comm: FakeComm, **more: Any) -> SymmetricMemory:
    settings: dict[str, Any] = {"busy": lambda: False, "tensor": on_cpu, **more}
    return SymmetricMemory(context(bootstrap), comm, memory, lambda: None, **settings)  # type: ignore[arg-type]


def close(of: SymmetricMemory, bootstrap: Any) -> None:
    """As the backend does, whose native `close` waits for the peers between the two."""
    of.unmap_all()
    bootstrap.barrier(what="closed")
    of.free_dropped()


def test_a_tensor_shows_own_memory_and_is_registered_with_that_of_all_ranks() -> None:
    pool = Pool()

    def body(bootstrap: Any) -> None:
        memory, comm = FakeMemory(pool), FakeComm()
        of = heap(bootstrap, memory, comm)
        x = of.empty((3, 5), torch.bfloat16)
        assert (x.shape, x.dtype) == ((3, 5), torch.bfloat16)
        bases, nbytes = comm.regions[1]
        assert nbytes == 30
        assert bases[bootstrap.rank] == x.data_ptr()
        assert len(set(bases)) == 3
        assert [b in memory.opened for b in bases] == [r != bootstrap.rank for r in range(3)]
        assert of.empty((0, 4), torch.float32).shape == (0, 4)
        assert list(comm.regions) == [1]
        close(of, bootstrap)
        x.fill_(2.0)  # it outlives the communicator
        assert len(memory.owned) == 1
        assert not memory.opened
        del x
        gc.collect()
        assert not memory.owned

    all_of(ranks(3, body, timeout=50.0, patience=20.0))
    assert not pool.live
    assert not pool.wrong


def test_memory_is_freed_in_the_next_step_after_all_ranks_let_go_and_not_before() -> None:
    pool = Pool()

    def body(bootstrap: Any) -> None:
        memory, comm = FakeMemory(pool), FakeComm()
        of = heap(bootstrap, memory, comm)
        x = of.empty((8,), torch.float32)
        if bootstrap.rank == 0:
            del x
            gc.collect()
        of.reclaim(bootstrap)  # rank 1 still has its
        assert len(memory.owned) == len(memory.opened) == len(comm.regions) == 1
        if bootstrap.rank == 1:
            del x
            gc.collect()
        assert len(memory.owned) == 1  # the collector itself frees nothing that a peer maps
        of.reclaim(bootstrap)
        assert not memory.owned
        assert not memory.opened
        assert not comm.regions
        close(of, bootstrap)

    all_of(ranks(2, body, timeout=50.0, patience=20.0))
    assert not pool.live
    assert not pool.wrong


@pytest.mark.parametrize("broken", ["full", "deaf"])
def test_a_rank_that_fails_leaves_all_ranks_able_to_go_on_and_nothing_behind(broken: str) -> None:
    pool = Pool()

    def body(bootstrap: Any) -> None:
        memory, comm = FakeMemory(pool), FakeComm()
        of = heap(bootstrap, memory, comm)
        kept = of.empty((4,), torch.float32)
        setattr(memory, broken, bootstrap.rank == 1)
        step = bootstrap.child("step", who="[step]", timeout=20.0)  # each of core's has a control plane of its own
        of._context = context(step)
        if bootstrap.rank == 1:
            with pytest.raises(NativeError) as caught:
                of.empty((4,), torch.float32)
            if broken == "full":
                step.fail(str(caught.value))  # as core does for a rank that raises in a step
        elif broken == "full":
            with pytest.raises(CommplaneError, match="no room"):
                of.empty((4,), torch.float32)
        else:
            of.empty((4,), torch.float32)  # core's vote takes it back
        of._context = context(bootstrap)
        setattr(memory, broken, False)
        gc.collect()
        after = of.empty((4,), torch.float32)
        assert sorted(comm.regions) == [1, 3]
        del kept, after
        gc.collect()
        of.reclaim(bootstrap)
        assert not memory.owned
        close(of, bootstrap)

    all_of(ranks(2, body, timeout=50.0, patience=20.0))
    assert not pool.live
    assert not pool.wrong


def test_a_tensor_that_goes_while_a_graph_is_captured_is_freed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetric, "_late", [])
    pool = Pool()

    def body(bootstrap: Any) -> None:
        memory, capturing = FakeMemory(pool), [False]
        of = heap(bootstrap, memory, FakeComm(), busy=lambda: capturing[0])
        x = of.empty((4,), torch.float32)
        close(of, bootstrap)
        bootstrap.barrier(what="both have closed the first")  # what waits is one list for the whole process
        capturing[0] = True
        del x
        gc.collect()
        assert len(memory.owned) == 1
        bootstrap.barrier(what="both have let go")
        capturing[0] = False
        other = heap(bootstrap, memory, FakeComm())
        close(other, bootstrap)
        bootstrap.barrier(what="both have closed")
        assert not memory.owned

    all_of(ranks(2, body, timeout=50.0, patience=20.0))
    assert not pool.live


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.long), 1])
def test_any_order_of_allocations_and_losses_ends_with_nothing_mapped_and_nothing_left(seed: int) -> None:
    pool, world_size = Pool(), 3

    def body(bootstrap: Any) -> None:
        joint, mine = random.Random(seed), random.Random(100 * seed + bootstrap.rank)
        memory, comm = FakeMemory(pool), FakeComm()
        of = heap(bootstrap, memory, comm)
        held: list[torch.Tensor] = []
        for _ in range(8):
            if joint.random() < 0.7:
                held.append(of.empty((joint.randint(1, 9), 3), torch.float16))
            else:
                of.reclaim(bootstrap)
            while held and mine.random() < 0.5:
                held.pop(mine.randrange(len(held)))
                gc.collect()
        close(of, bootstrap)
        held.clear()
        gc.collect()
        bootstrap.barrier(what="all gone")
        assert not memory.owned
        assert not memory.opened

    all_of(ranks(world_size, body, timeout=50.0, patience=20.0))
    assert not pool.live
    assert not pool.wrong
