"""Memory of `custom_ar` that grows, cannot grow, or outlives its communicator. Threads as ranks."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from car_threads import host, run

from commplane import errors, hookimpl
from commplane.runtime import Communicator, Plane
from commplane.testing import PluginHost, run_threads
from commplane_custom_ar import _native


def test_symmetric_memory_of_a_dtype_that_is_not_served_is_an_ordinary_tensor() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        assert tp.empty(8, dtype=torch.int16).shape == (8,)
        assert tp.empty(0, 4, dtype=torch.int64).shape == (0, 4)

    run(2, rank_main)


def test_prepare_grows_the_staging_and_keeps_symmetric_tensors_alive() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        kept = tp.empty(5000, dtype=torch.float32).fill_(1.0)
        dropped = tp.empty(5000, dtype=torch.float32)
        if tp.rank == 0:  # released on one rank only: the numbers of regions must not run apart
            del dropped
            gc.collect()
        before = tp.all_reduce(torch.ones(100_000))
        tp.prepare("all_reduce", dtype=torch.float32, max_bytes=400_000)
        assert torch.equal(tp.all_reduce(torch.ones(100_000)), before)
        assert tp.all_reduce_(kept)[0].item() == 2.0
        late = tp.empty(5000, dtype=torch.float32).fill_(3.0)
        assert tp.all_reduce_(late)[-1].item() == 6.0

    run(2, rank_main, chunk_bytes=65536)


# A message of 240 KiB goes in chunks of 64 KiB before `prepare`, and in one of 256 KiB after it.
COLLECTIVES: dict[str, Callable[[Communicator, torch.Tensor], object]] = {
    "all_reduce": lambda tp, x: tp.all_reduce(x),
    "all_gather": lambda tp, x: tp.all_gather(x),
    "reduce_scatter": lambda tp, x: tp.reduce_scatter(x),
    "broadcast": lambda tp, x: tp.broadcast(x, src=1),
    "all_reduce_rms_norm": lambda tp, x: tp.all_reduce_rms_norm(x, x, x[0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_prepare_makes_a_message_of_any_collective_go_in_one_chunk(collective: str, dtype: torch.dtype) -> None:
    call = COLLECTIVES[collective]
    message = torch.ones(60, 4096 // dtype.itemsize, dtype=dtype)

    def steps(tp: Communicator) -> int:
        call(tp, message.clone())
        comm = tp.backends[0]._staging.comm  # type: ignore[attr-defined]
        return int(comm.flight()[-1].steps)

    def rank_main(plane: Plane) -> tuple[int, int, int]:
        tp = plane.communicator("tp")
        before = steps(tp)
        tp.prepare(collective, dtype=dtype, max_bytes=message.nbytes)
        after = steps(tp)
        tp.prepare(collective, dtype=dtype, max_bytes=1000)  # less than there is already: nothing shrinks
        tp.prepare("barrier", max_bytes=1 << 30)  # carries no data
        return before, after, steps(tp)

    assert run(2, rank_main, chunk_bytes=1 << 18, single_copy="off") == [(4, 1, 1)] * 2


def test_prepare_with_different_arguments_raises_on_all_ranks_and_harms_nothing() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.MismatchError, match="rank 0 has max_bytes=1000; rank 1 has max_bytes=1001"):
            tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1000 + tp.rank)
        with pytest.raises(errors.MismatchError, match="arguments of empty"):
            tp.empty(4 + tp.rank)
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


def test_symmetric_tensors_outlive_their_communicator() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        x = tp.empty(1000, dtype=torch.float32).fill_(2.0)
        tp.all_reduce_(x)
        tp.close()
        assert x.sum().item() == 4000.0
        with pytest.raises(errors.CommunicatorError, match="is closed"):
            tp.all_reduce_(x)

    run(2, rank_main)


class CannotBuild:
    """A plugin of the site whose workspace fails on rank 1, after custom_ar has built its own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @hookimpl
    def commplane_init_workspace(self, communicator: Communicator, requirements: Any) -> list[Any]:
        if self.rank == 1:
            raise MemoryError("nothing left")
        return []


def test_a_prepare_that_is_rolled_back_leaves_everything_as_it_was() -> None:
    def plugins(rank: int) -> PluginHost:
        made = host()
        made.register(CannotBuild(rank), "zz_site")
        return made

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        x = tp.empty(1000, dtype=torch.float32)
        for _ in range(2):
            with pytest.raises(errors.CommunicatorError, match="rolled back on all ranks: rank 1: MemoryError: nothing left"):
                tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20)
            assert tp.all_reduce_(x.fill_(1.0))[0].item() == 2.0
            assert tp.all_reduce(torch.ones(9999))[-1].item() == 2.0

    out = run_threads(2, rank_main, plugins=plugins, config=lambda _rank: {"timeout": 30}, timeout=60)
    assert out == [None, None], out


def test_one_rank_that_cannot_map_fails_the_call_on_all_at_once_and_the_next_call_works(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _native.Segment.map
    failed: list[str] = []

    def fails_once(*args: Any) -> Any:
        if armed and threading.current_thread().name == "rank 1" and not failed:
            failed.append("once")
            raise OSError("no more descriptors")
        return real(*args)

    armed: list[bool] = []
    monkeypatch.setattr(_native.Segment, "map", staticmethod(fails_once))

    def rank_main(plane: Plane) -> float:
        tp = plane.communicator("tp")
        tp.barrier()
        armed.append(True)
        with pytest.raises(errors.CommunicatorError, match="rank 1: OSError: no more descriptors"):
            tp.empty(100, dtype=torch.float32)
        return tp.all_reduce_(tp.empty(100, dtype=torch.float32).fill_(1.0))[0].item()

    # A deadline that the test would not survive: nobody may sit it out.
    out = run_threads(2, rank_main, plugins=lambda _rank: host(), config=lambda _rank: {"timeout": 300}, timeout=60)
    assert out == [2.0, 2.0], out


def test_impossible_shapes_are_refused_before_anybody_waits() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for shape in [(-1,), (2.5,), ("x",)]:
            with pytest.raises(errors.UnsupportedOperation, match="empty wants"):
                tp.empty(*shape)
        assert tp.empty(torch.tensor(3), 2).shape == (3, 2)

    run(2, rank_main)


def test_more_allocations_than_there_is_room_for_are_a_joint_refusal_and_harm_nothing() -> None:
    def rank_main(plane: Plane) -> float:
        tp = plane.communicator("tp")
        kept = [tp.empty(1, dtype=torch.int8) for _ in range(256)]
        with pytest.raises(errors.CommunicatorError, match=r"empty failed and was rolled back on all ranks.*ELIMIT"):
            tp.empty(1, dtype=torch.int8)
        del kept[100]
        gc.collect()
        tp.barrier()
        kept.append(tp.empty(1, dtype=torch.int8))
        return sum(tp.all_reduce_(x.fill_(1)).item() for x in kept)

    assert run(2, rank_main) == [512, 512]


HUGE = [
    ((2**50,), "ranks 0, 1: .*wanted at most 140737488355328 bytes on all 2 ranks together, found 2 times 1125899906842624"),
    ((2**62,), "ranks 0, 1: .*wanted at most"),
    ((2**64 + 1024,), "ranks 0, 1: .*wanted at most"),
    ((2**45,), "ranks? [01].*ENOSPC"),  # a size that can be named, and that no /dev/shm has
]


@pytest.mark.parametrize(("shape", "reason"), HUGE)
def test_huge_sizes_are_refused_jointly_and_reserve_nothing(shape: tuple[int, ...], reason: str) -> None:
    def rank_main(plane: Plane) -> float:
        tp = plane.communicator("tp")
        with pytest.raises(errors.CommunicatorError, match=f"empty failed and was rolled back on all ranks: {reason}"):
            tp.empty(*shape, dtype=torch.int8)
        tp.prepare("all_reduce", dtype=torch.float32, max_bytes=2**50)  # staging grows to chunk_bytes and no further
        return tp.all_reduce(torch.ones(1)).item()

    assert run(2, rank_main) == [2.0, 2.0]
