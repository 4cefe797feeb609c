"""`torch.ops.commplane.*`: what the operators give and refuse, what a trace knows of that, and how they are registered."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import commplane
from commplane import errors, ops
from commplane.testing import Outcome, PluginHost, run_processes

NAMES = ["all_gather", "all_reduce", "all_reduce_", "all_reduce_rms_norm", "broadcast", "broadcast_", "reduce_scatter"]


def results(outcomes: list[Outcome]) -> list[Any]:
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


def layouts(shape: tuple[int, int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same numbers, laid out in several ways."""
    full = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    yield "contiguous", full.clone()
    yield "transposed", full.t().contiguous().t()
    yield "strided", torch.zeros(shape[0], 2 * shape[1])[:, ::2].copy_(full)
    yield "unaligned", torch.zeros(full.numel() + 1)[1:].reshape(shape).copy_(full)
    yield "negated view", torch.complex(torch.zeros(shape), -full).conj().imag


def every_call(x: torch.Tensor, comm: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each operator with arguments that `x` goes with."""
    op, group = torch.ops.commplane, comm.handle
    weight = torch.linspace(0.5, 2.0, x.shape[-1], dtype=x.dtype)
    return {
        "all_reduce": (op.all_reduce.default, (x, "avg", group)),
        "all_reduce_": (op.all_reduce_.default, (x, "max", group)),
        "all_gather": (op.all_gather.default, (x, group)),
        "reduce_scatter": (op.reduce_scatter.default, (x, "sum", group)),
        "broadcast": (op.broadcast.default, (x, comm.world_size - 1, group)),
        "broadcast_": (op.broadcast_.default, (x, 0, group)),
        "all_reduce_rms_norm": (op.all_reduce_rms_norm.default, (x, x + 1, weight, 1e-6, 0.0, group)),
    }


def compares_with_methods(store: Any, rank: int, world_size: int) -> None:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        for name, x in layouts((4, 6)):
            x = x * (rank + 1) - 7 if name != "negated view" else x
            before = x.clone()
            for op in ("sum", "min", "max", "avg"):
                pairs = [
                    (ops.all_reduce(x, tp, op), tp.all_reduce(x, op)),
                    (ops.reduce_scatter(x, tp, op), tp.reduce_scatter(x, op)),
                    (ops.all_reduce_(x.clone(), tp, op), tp.all_reduce_(x.clone(), op)),
                ]
                for found, wanted in pairs:
                    assert torch.equal(found, wanted), (name, op)
            assert torch.equal(ops.all_gather(x, tp), tp.all_gather(x)), name
            for src in range(world_size):
                assert torch.equal(ops.broadcast(x, tp, src), tp.broadcast(x.clone(), src)), name
                assert torch.equal(ops.broadcast_(x.clone(), tp.handle, src), tp.broadcast(x.clone(), src)), name
            weight = torch.arange(6, dtype=x.dtype)
            found = ops.all_reduce_rms_norm(x, before, weight, tp, 1e-3, 1.0)
            wanted = tp.all_reduce_rms_norm(x, before, weight, 1e-3, 1.0)
            assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]), name
            assert torch.equal(x, before), f"{name}: an operator changed its input"
            y = x.clone()
            assert ops.all_reduce_(y, tp) is y and ops.broadcast_(y, tp) is y


def test_operators_give_what_the_methods_give_whatever_the_layout() -> None:
    results(run_processes(2, compares_with_methods, timeout=120))


def checks_operators(store: Any, rank: int, world_size: int) -> list[str]:
    checked = []
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        for name, (operator, arguments) in every_call(torch.randn(6, 4).t(), tp).items():
            torch.library.opcheck(operator, arguments)
            checked.append(name)
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            operator, arguments = every_call(torch.randn(4, 6, requires_grad=True), tp)[name]
            torch.library.opcheck(operator, arguments)
            checked.append(f"{name} gradient")
    return checked


def test_every_operator_passes_torchs_own_check_of_operators() -> None:
    said = results(run_processes(2, checks_operators, timeout=150))
    assert len(said[0]) == len(NAMES) + 3 and said[0] == said[1]


def gives_fresh_tensors(store: Any, rank: int, world_size: int) -> None:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        for layout, x in [*layouts((4, 6)), ("expanded", torch.ones(1, 6).expand(4, 6)), ("empty", torch.ones(0, 6))]:
            for name, (operator, arguments) in every_call(x, tp).items():
                if name.endswith("_"):
                    continue
                real = operator(*arguments)
                with FakeTensorMode() as mode:
                    fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
                both = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
                for r, f in zip(*both, strict=True):
                    assert r.is_contiguous() and (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype), (name, layout)
                    if r.numel():
                        assert r.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), (name, layout)


@pytest.mark.parametrize("world_size", [1, 2])
def test_results_are_new_contiguous_tensors_as_the_trace_said(world_size: int) -> None:
    results(run_processes(world_size, gives_fresh_tensors, timeout=120))


def survives_reloads(store: Any, rank: int, world_size: int) -> None:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        x = torch.ones(3, requires_grad=True)
        wanted = ops.all_reduce(x, tp)
        parts = ["fake", "gradients", "kernels", "library"]
        for part in parts:
            importlib.reload(sys.modules[f"commplane.ops.{part}"])
        again = importlib.reload(sys.modules["commplane.ops"])
        assert torch.equal(again.all_reduce(x, tp), wanted)
        for name in ("commplane.ops", *(f"commplane.ops.{part}" for part in parts)):
            del sys.modules[name]
        anew = importlib.import_module("commplane.ops")
        assert anew is not again
        del again
        gc.collect()
        out = anew.all_reduce(x, tp)
        out.sum().backward()
        assert torch.equal(out, wanted) and torch.equal(x.grad, torch.ones(3))
        assert sorted(set(dir(torch.ops.commplane)) & set(NAMES)) == NAMES


def test_importing_the_operators_again_or_reloading_them_leaves_them_as_they_were() -> None:
    results(run_processes(1, survives_reloads))


def alone() -> Any:
    """A plane of one rank, in this thread: torch 2.11 without a GPU dies where a second thread enters `FakeTensorMode`."""
    return commplane.init(store=torch.distributed.HashStore(), rank=0, world_size=1, plugins=PluginHost())


def test_a_handle_names_one_communicator_and_is_never_used_again() -> None:
    with alone() as plane:
        first = plane.communicator("handles")
        other = plane.communicator("other")
        assert first.handle.startswith("handles/1#") and other.handle.startswith("other/1#")
        assert ops.all_reduce(torch.ones(1), first.handle).item() == 1.0
        first.close()
        again = plane.communicator("handles")
        assert again.handle != first.handle
        with pytest.raises(errors.CommunicatorError, match=r"\[handles rank 0/1\] is closed: create it again"):
            ops.all_reduce(torch.ones(1), first.handle)
        handle = first.handle
        del first
        gc.collect()
        with pytest.raises(errors.CommunicatorError, match=rf"found '{handle}' \(known: .*{again.handle}.*\): pass an open"):
            ops.all_reduce(torch.ones(1), handle)
        with pytest.raises(errors.CommunicatorError, match="found 'nonsense'"), FakeTensorMode() as mode:
            ops.all_reduce(mode.from_tensor(torch.ones(1)), "nonsense")


def names_its_groups(store: Any, rank: int, world_size: int) -> list[str]:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        own = plane.communicator("own", [rank])
        first = plane.communicator("tp")
        first.close()
        return [own.handle, first.handle, plane.communicator("tp").handle]


def test_ranks_that_create_the_same_groups_have_the_same_handles() -> None:
    assert results(run_processes(2, names_its_groups)) == [["own/1#1", "tp/2#1", "tp/2#2"]] * 2


def test_a_poisoned_communicator_raises_its_error_from_an_operator() -> None:
    with alone() as plane:
        comm = plane.communicator("ops")
        comm.poison(errors.PeerError("rank 5 is lost", [5]))
        with pytest.raises(errors.PeerError, match=r"poisoned by an earlier fault.*rank 5 is lost") as caught:
            ops.all_reduce(torch.ones(1), comm)
        assert caught.value.missing_ranks == (5,)


@pytest.mark.parametrize("traced", [False, True], ids=["called", "traced"])
def test_what_a_communicator_refuses_its_operators_refuse_in_the_same_words(traced: bool) -> None:
    with alone() as plane:
        comm = plane.communicator("ops")
        with FakeTensorMode() if traced else torch.no_grad():

            def refuses(words: str, call: Any) -> None:
                with pytest.raises(errors.UnsupportedOperation, match=words):
                    call()

            x = torch.ones(2, 3)
            refuses("wanted op sum, min, max, avg, found 'mean'", lambda: ops.all_reduce(x, comm, "mean"))
            refuses("op avg wants a floating-point dtype, found int32", lambda: ops.all_reduce(x.int(), comm, "avg"))
            refuses("all_gather of complex64 is served by no backend", lambda: ops.all_gather(x.to(torch.complex64), comm))
            refuses("all_gather wants a tensor with a first dimension", lambda: ops.all_gather(torch.tensor(1.0), comm))
            refuses("reduce_scatter wants a tensor with a first dimension", lambda: ops.reduce_scatter(torch.tensor(1.0), comm))
            refuses("wants src as a group rank below 1, found 1", lambda: ops.broadcast(x, comm, 1))
            refuses("wants src as a group rank below 1, found -1", lambda: ops.broadcast_(x, comm, -1))
            refuses("all_reduce_rms_norm wants a", lambda: ops.all_reduce_rms_norm(x, x[:1], torch.ones(3), comm))
            refuses("all_reduce_rms_norm wants a", lambda: ops.all_reduce_rms_norm(x, x, torch.ones(2), comm))
            ops.all_reduce(x, comm)  # and goes on


def refuses_uneven_parts(store: Any, rank: int, world_size: int) -> None:
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        for mode in (torch.no_grad(), FakeTensorMode()):
            with mode, pytest.raises(errors.UnsupportedOperation, match=r"2 ranks divide, found shape \[.?3.?, .?2.?\]: pad it"):
                ops.reduce_scatter(torch.ones(3, 2), tp)


def test_a_first_dimension_that_the_ranks_do_not_divide_is_refused_when_it_is_traced() -> None:
    results(run_processes(2, refuses_uneven_parts))


def test_meta_tensors_have_shapes_and_send_nothing() -> None:
    with alone() as plane:
        comm = plane.communicator("ops")
        out = ops.all_gather(torch.ones(3, 2, device="meta"), comm)
        assert out.device.type == "meta" and out.shape == (3, 2)


def test_other_devices_have_no_kernel() -> None:
    with alone() as plane:
        comm = plane.communicator("ops")
        with pytest.raises(NotImplementedError, match="commplane::all_reduce"):
            torch.ops.commplane.all_reduce(torch.ones(2).to_sparse(), "sum", comm.handle)
        assert ops.all_reduce(torch.ones(1), comm).item() == 1.0


def test_a_method_refuses_the_tensors_of_a_trace_and_the_communicator_goes_on() -> None:
    with alone() as plane:
        comm = plane.communicator("ops")
        calls = [comm.all_reduce, comm.all_reduce_, comm.all_gather, comm.reduce_scatter, comm.broadcast]
        with FakeTensorMode():
            x, weight = torch.ones(2, 3), torch.ones(3)
            for call in (*calls, lambda x: comm.all_reduce_rms_norm(x, x, weight)):
                with pytest.raises(errors.UnsupportedOperation, match="found the FakeTensor of a trace"):
                    call(x)
        assert comm.all_reduce(torch.ones(1)).item() == 1.0


def test_operators_can_be_traced_by_export_and_make_fx() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.all_gather(x * 2, group)

    with alone() as plane, torch.no_grad():
        group = plane.communicator("ops").handle
        x = torch.ones(2, 3)
        exported = torch.export.export(Module(), (x,), strict=False).module()
        traced = make_fx(Module(), tracing_mode="symbolic")(x)
        for function in (exported, traced):
            assert torch.ops.commplane.all_gather.default in [n.target for n in function.graph.nodes]
            assert torch.equal(function(x), x * 2)
