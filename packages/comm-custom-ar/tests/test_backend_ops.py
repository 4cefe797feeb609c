"""PyTorch's operators and compiler over `custom_ar`: its results and its faults come through both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import commplane
from commplane import ops
from commplane.errors import UnsupportedOperation
from commplane.testing import PluginHost, run_processes, shm_leftovers
from commplane_custom_ar import plugin

pytestmark = pytest.mark.timeout(300)

TIMEOUT_S = 3.0
ROWS, HIDDEN, INNER = 6, 64, 96


@pytest.fixture(autouse=True)
def shared_memory_is_left_as_it_was() -> Iterator[None]:
    before = shm_leftovers()
    yield
    assert shm_leftovers() <= before


def two_ranks(function: Callable[..., Any]) -> list[Any]:
    """Ranks are processes, never threads: the compiler holds a lock in which a rank would wait for the other."""
    outcomes = run_processes(2, function, timeout=280)
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


def plane_of(store: Any, rank: int, world_size: int, **settings: Any) -> commplane.Plane:
    host = PluginHost()
    host.register(plugin, "custom_ar", dist="commplane-custom-ar", version="0.1.0")
    return commplane.init(store=store, rank=rank, world_size=world_size, plugins=host, config={"timeout": 60, **settings})


def parameter(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_the_same_compiled(store: Any, rank: int, world_size: int) -> list[str]:
    with plane_of(store, rank, world_size) as plane, torch.inference_mode():
        tp = plane.communicator("tp")
        up, down = parameter(INNER, HIDDEN, seed=1).chunk(2, 0)[rank], parameter(HIDDEN, INNER, seed=2).chunk(2, 1)[rank]
        weight = parameter(HIDDEN, seed=3)

        def layer(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
            normed, residual = tp.all_reduce_rms_norm(x, residual, weight)
            out = tp.all_reduce_(F.linear(F.gelu(F.linear(normed, up)), down))
            return out, residual, tp.all_gather(out), tp.reduce_scatter(out, "avg"), tp.all_reduce(residual.t(), "min")

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for dtype in (torch.float32, torch.bfloat16):
            up, down, weight = up.to(dtype), down.to(dtype), weight.to(dtype)
            x, residual = parameter(ROWS, HIDDEN, seed=10 + rank).to(dtype), parameter(ROWS, HIDDEN, seed=4).to(dtype)
            for found, wanted in zip(compiled(x, residual), layer(x, residual), strict=True):
                assert torch.equal(found, wanted), dtype
        return list(tp.plan.backends)


def test_a_compiled_block_gives_bit_for_bit_what_the_eager_one_gives() -> None:
    assert two_ranks(is_the_same_compiled) == [["custom_ar", "torch"]] * 2


def has_gradients(store: Any, rank: int, world_size: int) -> None:
    with plane_of(store, rank, world_size) as plane:
        tp = plane.communicator("tp")
        full = parameter(INNER, HIDDEN, seed=1), parameter(HIDDEN, INNER, seed=2)
        up, down = full[0].chunk(2, 0)[rank].clone(), full[1].chunk(2, 1)[rank].clone()

        def split(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            return ops.reduce_from_group(F.linear(F.gelu(F.linear(ops.copy_to_group(x, tp), up)), down), tp).sin().sum()

        def gradients(function: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            leaves = [t.clone().requires_grad_() for t in tensors]
            return torch.autograd.grad(function(*leaves), leaves)

        x = parameter(ROWS, HIDDEN, seed=5)
        wanted = gradients(lambda x, up, down: F.linear(F.gelu(F.linear(x, up)), down).sin().sum(), x, *full)
        wanted = wanted[0], wanted[1].chunk(2, 0)[rank], wanted[2].chunk(2, 1)[rank]
        eager = gradients(split, x, up, down)
        compiled = gradients(torch.compile(split, fullgraph=True, backend="aot_eager"), x, up, down)
        for w, e, c in zip(wanted, eager, compiled, strict=True):
            torch.testing.assert_close(e, w, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(c, w, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_a_block_has_the_gradients_of_one_process_eager_and_compiled() -> None:
    two_ranks(has_gradients)


def takes_symmetric_tensors(store: Any, rank: int, world_size: int) -> None:
    with plane_of(store, rank, world_size) as plane:
        tp = plane.communicator("tp")
        x = tp.empty(ROWS, HIDDEN).fill_(rank + 1.0)
        function = torch.compile(lambda x: ops.all_reduce_(x, tp) * 2, fullgraph=True, backend="aot_eager")
        assert torch.equal(ops.all_reduce(x, tp), torch.full_like(x, 3.0))
        assert torch.equal(function(x), torch.full_like(x, 6.0)) and torch.equal(x, torch.full_like(x, 3.0))


def test_symmetric_tensors_go_through_operators_and_graphs() -> None:
    two_ranks(takes_symmetric_tensors)


def passes_opcheck(store: Any, rank: int, world_size: int) -> None:
    with plane_of(store, rank, world_size) as plane:
        group, op = plane.communicator("tp").handle, torch.ops.commplane
        x, weight = torch.randn(4, 6), torch.randn(6)
        torch.library.opcheck(op.all_reduce.default, (x.t(), "sum", group))
        torch.library.opcheck(op.all_reduce_.default, (x, "sum", group))
        torch.library.opcheck(op.all_gather.default, (x.t(), group))
        torch.library.opcheck(op.reduce_scatter.default, (x.t(), "max", group))
        torch.library.opcheck(op.broadcast.default, (x.t(), 1, group))
        torch.library.opcheck(op.broadcast_.default, (x, 1, group))
        torch.library.opcheck(op.all_reduce_rms_norm.default, (x, x, weight, 1e-6, 0.0, group))


@pytest.mark.long
def test_every_operator_passes_torchs_own_check_of_operators() -> None:
    two_ranks(passes_opcheck)


def refuses_tensors_of_a_trace(store: Any, rank: int, world_size: int) -> None:
    with plane_of(store, rank, world_size) as plane:
        tp = plane.communicator("tp")
        calls = [tp.all_reduce, tp.all_reduce_, tp.all_gather, tp.reduce_scatter, tp.broadcast]
        with FakeTensorMode():
            x, weight = torch.ones(4, HIDDEN), torch.ones(HIDDEN)
            for call in (*calls, lambda x: tp.all_reduce_rms_norm(x, x, weight), lambda x: tp.all_reduce(x.t())):
                with pytest.raises(UnsupportedOperation, match="found the FakeTensor of a trace"):
                    call(x)
        assert tp.all_reduce(torch.ones(1)).item() == 2.0


def test_a_method_refuses_the_tensors_of_a_trace_and_the_communicator_goes_on() -> None:
    two_ranks(refuses_tensors_of_a_trace)


def loses_a_rank(store: Any, rank: int, world_size: int) -> list[Any]:
    plane = plane_of(store, rank, world_size, run_timeout=TIMEOUT_S)
    tp = plane.communicator("tp")
    function = torch.compile(lambda x: tp.all_reduce(x) + 1, fullgraph=True, backend="aot_eager")
    assert function(torch.ones(8))[0].item() == 3.0
    if rank == 1:
        return []  # and the process ends
    raised = []
    for _ in range(2):
        try:
            function(torch.ones(8))
        except commplane.errors.PeerError as error:
            raised.append([list(error.missing_ranks), "poisoned" in str(error)])
    plane.close()
    return raised


def test_a_lost_rank_is_named_by_what_a_compiled_function_raises() -> None:
    assert two_ranks(loses_a_rank) == [[[[1], False], [[1], True]], []]
