"""Gradients through the operators are those of one process that computes what all ranks compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block import SPLIT, TrainingBlock, inputs

import commplane
from commplane import errors, ops
from commplane.api import Quantization
from commplane.testing import Outcome, PluginHost, run_processes

N = 2


def results(outcomes: list[Outcome]) -> list[Any]:
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


def tensor(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


# What the ranks compute together: from the list of their inputs, the list of their results.
TOGETHER: dict[str, Callable[[list[torch.Tensor]], list[torch.Tensor]]] = {
    "all_reduce sum": lambda xs: [sum(xs)] * N,
    "all_reduce avg": lambda xs: [sum(xs) / N] * N,
    "all_gather": lambda xs: [torch.cat(xs)] * N,
    "reduce_scatter sum": lambda xs: list(sum(xs).chunk(N)),
    "reduce_scatter avg": lambda xs: list((sum(xs) / N).chunk(N)),
}


def run_operator(name: str, x: torch.Tensor, comm: Any) -> torch.Tensor:
    word, _, op = name.partition(" ")
    operator = getattr(ops, word)
    return operator(x, comm, op) if op else operator(x, comm)


def loss(y: torch.Tensor, rank: int) -> torch.Tensor:
    """Another one on each rank, not linear, so that every element has a gradient of its own."""
    return (y.sin() * tensor(100 + rank, *y.shape)).sum()


def has_the_gradients_of_one_process(store: Any, rank: int, world_size: int) -> list[str]:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        for name, together in TOGETHER.items():
            xs = [tensor(r, 4, 3).requires_grad_() for r in range(N)]
            ys = together(xs)
            total = sum((loss(y, r) for r, y in enumerate(ys)), torch.zeros(()))
            wanted = torch.autograd.grad(total, xs, create_graph=True)
            second = torch.autograd.grad(sum(g.pow(3).sum() for g in wanted), xs)

            x = xs[rank].detach().t().contiguous().t().requires_grad_()
            y = run_operator(name, x, tp)
            assert y.requires_grad and torch.allclose(y, ys[rank]), name
            (found,) = torch.autograd.grad(loss(y, rank), x, create_graph=True)
            assert torch.allclose(found, wanted[rank]), name
            # Every rank's loss depends on every rank's gradient; the transpose of the transpose adds that up.
            (twice,) = torch.autograd.grad(found.pow(3).sum(), x)
            assert torch.allclose(twice, second[rank]), name

            # A gradient that is one number at all places, as `sum` gives.
            x.grad = None
            run_operator(name, x, tp).sum().backward()
            ones = torch.autograd.grad(sum((y.sum() for y in together(xs)), torch.zeros(())), xs)[rank]
            assert torch.allclose(x.grad, ones), name
    return list(TOGETHER)


def test_each_operator_has_the_gradient_and_second_gradient_of_one_process() -> None:
    assert results(run_processes(N, has_the_gradients_of_one_process)) == [list(TOGETHER)] * N


def trains_a_block(store: Any, rank: int, world_size: int) -> None:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        whole, split = TrainingBlock(), TrainingBlock(tp)
        x, x_split = inputs(3).requires_grad_(), inputs(3).requires_grad_()
        wanted, found = whole(x), split(x_split)
        assert torch.allclose(found, wanted)
        wanted.sin().sum().backward()
        found.sin().sum().backward()
        assert torch.allclose(x_split.grad, x.grad)
        for name, parameter in split.named_parameters():
            full = whole.get_parameter(name).grad
            assert torch.allclose(parameter.grad, split.mine(full, SPLIT.get(name))), name


def test_a_tensor_parallel_block_trains_as_the_whole_one() -> None:
    results(run_processes(N, trains_a_block))


def alone() -> Any:
    """A plane of one rank."""
    return commplane.init(store=torch.distributed.HashStore(), rank=0, world_size=1, plugins=PluginHost())


def test_what_has_no_gradient_is_refused_for_a_tensor_that_requires_one() -> None:
    with alone() as plane:
        comm = plane.communicator("tp")
        x = torch.ones(2, 3, requires_grad=True)
        plain, weight, how = torch.ones(2, 3), torch.ones(3, requires_grad=True), Quantization("fp8_token")
        for op in ("min", "max"):
            for function in (ops.all_reduce, ops.reduce_scatter):
                with pytest.raises(
                    errors.UnsupportedOperation, match=f"wants op sum or avg, found '{op}', which has no gradient"
                ):
                    function(x, comm, op)
        for call in (
            lambda: ops.all_reduce_(x, comm),
            lambda: ops.broadcast(x, comm),
            lambda: ops.broadcast_(x, comm),
            lambda: ops.all_reduce_rms_norm(x, plain, weight.detach(), comm),
            lambda: ops.all_reduce_rms_norm(plain, x, weight.detach(), comm),
            lambda: ops.all_reduce_rms_norm(plain, plain, weight, comm),
            lambda: ops.all_reduce_rms_norm_quant(x, plain, weight.detach(), comm, how),
            lambda: ops.all_reduce_rms_norm_quant(plain, x, weight.detach(), comm, how),
            lambda: ops.all_reduce_rms_norm_quant(plain, plain, weight, comm, how),
        ):
            with pytest.raises(errors.UnsupportedOperation, match="has no gradient, found a tensor that requires grad: detach"):
                call()
            with torch.no_grad():
                call()
        assert torch.equal(ops.all_reduce(plain, comm, "max"), plain)


def test_without_grad_mode_nothing_is_recorded() -> None:
    with alone() as plane:
        comm = plane.communicator("tp")
        x = torch.ones(2, 3, requires_grad=True)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                for function in (ops.all_reduce, ops.all_gather, ops.reduce_scatter, ops.reduce_from_group):
                    assert not function(x, comm).requires_grad
                assert ops.copy_to_group(x, comm) is x


def test_autograd_sees_that_a_tensor_it_saved_was_overwritten() -> None:
    with alone() as plane:
        comm = plane.communicator("tp")
        for overwrite in (ops.all_reduce_, ops.broadcast_):
            w, saved = torch.ones(3, requires_grad=True), torch.ones(3)
            out = (w * saved).sum()
            overwrite(saved, comm)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.backward()


def test_inference_tensors_are_taken() -> None:
    with alone() as plane:
        comm = plane.communicator("tp")
        with torch.inference_mode():
            x = torch.ones(2, 3)
            ops.all_reduce_(x, comm)
        ops.broadcast_(x, comm)
        assert torch.equal(ops.all_reduce(x, comm), x)
