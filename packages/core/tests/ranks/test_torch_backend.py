"""The torch.distributed backend through the public API, threads as ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from commplane import errors
from commplane.api import BackendSpec, BuildContext, hookimpl
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads

DTYPES = ["float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64"]


def run(world_size: int, function: Callable[[Plane], Any]) -> list[Any]:
    out = run_threads(world_size, function, config=lambda _rank: {"timeout": 30}, timeout=120)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Small integers, exact in every dtype."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return ((torch.arange(count) * (rank + 2) + rank) % 7).reshape(shape).to(dtype)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_collective_dtype_and_shape(world_size: int) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for name in DTYPES:
            dtype = getattr(torch, name)
            for shape in [(0,), (world_size,), (world_size * 2, 5), (world_size, 0, 3)]:
                parts = [values(r, shape, dtype) for r in range(world_size)]
                stacked = torch.stack(parts).double()
                wanted = {"sum": stacked.sum(0)}
                if stacked.numel():
                    wanted |= {"min": stacked.amin(0), "max": stacked.amax(0)}
                if dtype.is_floating_point:
                    wanted["avg"] = stacked.sum(0).to(dtype).div(world_size).double()
                mine = parts[tp.rank]
                for op, want in wanted.items():
                    assert torch.equal(tp.all_reduce(mine, op).double(), want), (name, shape, op)
                    assert torch.equal(mine, parts[tp.rank]), "out of place changed its input"
                    part = tp.reduce_scatter(mine, op).double()
                    rows = shape[0] // world_size
                    assert torch.equal(part, want[tp.rank * rows : (tp.rank + 1) * rows]), (name, shape, op)
                assert torch.equal(tp.all_gather(mine), torch.cat(parts))
                for src in range(world_size):
                    x = mine.clone()
                    assert tp.broadcast(x, src) is x
                    assert torch.equal(x, parts[src])
        tp.barrier()

    run(world_size, rank_main)


def test_tensors_that_are_not_contiguous_are_reduced_where_they_are() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        whole = torch.zeros(6, 8)
        view = whole[::2, 1::3].fill_(float(tp.rank + 1))
        assert tp.all_reduce_(view) is view
        assert whole.sum().item() == 3.0 * view.numel()
        assert torch.equal(tp.broadcast(view.t(), src=1), torch.full((3, 3), 3.0))
        assert torch.equal(tp.all_gather(view.t()), torch.full((6, 3), 3.0))

    run(2, rank_main)


def test_group_ranks_are_not_global_ranks() -> None:
    def rank_main(plane: Plane) -> None:
        if plane.rank == 0:
            return
        tp = plane.communicator("tp", [2, 1])  # rank 0 takes no part, and the order is the caller's
        assert tp.rank == {2: 0, 1: 1}[plane.rank]
        assert tp.all_gather(torch.tensor([plane.rank])).tolist() == [2, 1]
        assert tp.broadcast(torch.tensor([plane.rank]), src=0).item() == 2

    run(3, rank_main)


def test_orthogonal_groups_of_equal_size_and_name_do_not_mix() -> None:
    def rank_main(plane: Plane) -> list[float]:
        row = plane.communicator("g", [0, 1] if plane.rank < 2 else [2, 3])
        column = plane.communicator("g", [0, 2] if plane.rank % 2 == 0 else [1, 3])
        x = torch.tensor([2.0**plane.rank])
        return [row.all_reduce(x).item(), column.all_reduce(x).item()]

    assert run(4, rank_main) == [[3, 5], [3, 10], [12, 5], [12, 10]]


def test_several_communicators_are_used_in_turns() -> None:
    def rank_main(plane: Plane) -> None:
        comms = [plane.communicator(f"c{i}") for i in range(3)]
        for i in range(10):
            for c in comms:
                assert c.all_reduce(torch.tensor([float(i)])).item() == 2.0 * i

    run(2, rank_main)


def test_without_symmetric_memory_empty_gives_ordinary_tensors_and_prepare_is_content() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        tp.prepare("all_reduce", dtype=torch.bfloat16, max_bytes=1 << 20)
        x = tp.empty(2, 3, dtype=torch.int64)
        assert x.shape == (2, 3) and x.dtype is torch.int64
        assert tp.empty((4,)).dtype is torch.get_default_dtype()

    run(2, rank_main)


def test_unsupported_calls_name_the_reason_of_each_backend() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match=r"\[tp rank \d/2\] all_reduce of complex64 .*torch: serves"):
            tp.all_reduce(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(errors.UnsupportedOperation, match="op avg wants a floating-point dtype, found int32"):
            tp.all_reduce(torch.zeros(2, dtype=torch.int32), "avg")
        with pytest.raises(errors.UnsupportedOperation, match="wanted a tensor on cpu, found one on meta"):
            tp.all_reduce(torch.zeros(2, device="meta"))
        with pytest.raises(errors.UnsupportedOperation, match="found a scalar"):
            tp.all_gather(torch.tensor(1.0))
        assert tp.all_reduce(torch.ones(1)).item() == 2.0

    run(2, rank_main)


def test_numerics_rank_order_refuses_reductions_that_promise_none() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match="numerics=rank_order"):
            tp.all_reduce(torch.ones(1))
        assert tp.all_gather(torch.ones(1)).tolist() == [1.0, 1.0]

    out = run_threads(2, rank_main, config=lambda _rank: {"numerics": "rank_order"})
    assert out == [None, None], out


def test_close_is_idempotent_and_use_afterwards_says_so() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        tp.close()
        tp.close()
        assert tp.closed and tp not in plane.communicators
        for call in (lambda: tp.all_reduce(torch.ones(1)), tp.barrier, lambda: tp.prepare(max_bytes=1)):
            with pytest.raises(errors.CommunicatorError, match=r"\[tp rank \d/2\] is closed"):
                call()
        again = plane.communicator("tp")
        assert again.all_reduce(torch.ones(1)).item() == 2.0
        with pytest.raises(errors.CommunicatorError, match="is open already"):
            plane.communicator("tp")
        plane.close()
        plane.close()
        with pytest.raises(errors.CommplaneError, match="plane that is closed"):
            plane.communicator("late")

    run(2, rank_main)


def test_an_unclosed_communicator_only_warns() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.warns(ResourceWarning, match="was never closed"):
            tp.__del__()

    out = run_threads(1, rank_main)
    assert out == [None], out


@pytest.mark.parametrize(
    ("ranks", "words"),
    [([0, 0], "each rank once"), ([], "each rank once"), ([0, 7], "ranks below 2"), ([1], "rank 0 is not in it")],
)
def test_impossible_rank_lists_are_refused_before_anybody_waits(ranks: list[int], words: str) -> None:
    def rank_main(plane: Plane) -> None:
        if plane.rank == 0:
            with pytest.raises(errors.ConfigError, match=words):
                plane.communicator("tp", ranks)

    run(2, rank_main)


def test_collectives_are_outside_of_autograd() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        x = torch.ones(4, 2, requires_grad=True)
        for out in (tp.all_reduce(x), tp.all_gather(x), tp.reduce_scatter(x), tp.all_reduce(x.t())):
            assert not out.requires_grad
        assert tp.all_reduce_(x) is x
        assert x.sum().item() == 16.0

    run(2, rank_main)


def test_words_that_are_no_collective_are_refused() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match=r"prepare wants one of all_reduce.*found 'all_reduced'"):
            tp.prepare("all_reduced", max_bytes=1)
        with pytest.raises(errors.UnsupportedOperation, match="explain wants one of"):
            tp.plan.explain("all_reduced")
        assert tp.plan.explain(op="avg", dtype="int64").chosen is None

    run(2, rank_main)


@pytest.mark.skipif(
    not hasattr(torch.distributed.ProcessGroupGloo, "set_timeout"), reason="Gloo of this torch has one timeout for everything"
)
@pytest.mark.timeout(60)
def test_a_rank_that_is_slow_to_connect_has_the_time_of_a_start_up() -> None:
    class Slow:
        @hookimpl
        def commplane_build_communicator(self, spec: BackendSpec, context: BuildContext) -> None:
            if context.rank == 1:
                time.sleep(2.0)  # four times as long as a running operation may wait

    def plugins(_rank: int) -> PluginHost:
        host = PluginHost()
        host.register(Slow(), "slow")
        return host

    def rank_main(plane: Plane) -> float:
        with plane.communicator("tp") as tp:
            return float(tp.all_reduce(torch.ones(1)))

    limits = {"startup_timeout": 30, "run_timeout": 0.5}
    assert run_threads(2, rank_main, plugins=plugins, config=lambda _rank: limits, timeout=50) == [2.0, 2.0]
