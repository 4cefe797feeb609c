# SPDX-License-Identifier: Apache-2.0
"""What the calls on CUDA tensors hand to the library: any layout arrives whole, and nothing wrong arrives at all.

One rank, without a GPU: tensors of the CPU, and a library that stands in for the group of two equal ranks.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from commplane.errors import CommunicatorError, UnsupportedOperation
from commplane_custom_ar.codes import DTYPES
from commplane_custom_ar.cuda.calls import Target
from commplane_custom_ar.plugin import commplane_register_comm_backends

pytestmark = pytest.mark.timeout(60)

F32 = DTYPES["float32"]
STREAM = 77


def at(pointer: int, count: int) -> Any:
    """float32 numbers at an address."""
    return numpy.ctypeslib.as_array((ctypes.c_float * count).from_address(pointer)) if count else numpy.zeros(0, "f")


class Library:
    """The functions, on host memory. Both ranks have the same tensor; `calls` are the arguments of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.status = 0

    def cuda_all_reduce(self, *args: Any) -> int:
        self.calls.append(args)
        _, source, to, count, _, _ = args
        at(to, count)[:] = 2 * at(source, count)
        return self.status

    def cuda_all_gather(self, *args: Any) -> int:
        self.calls.append(args)
        _, source, to, count, _, _ = args
        at(to, 2 * count)[:] = numpy.concatenate([at(source, count)] * 2)
        return self.status

    def cuda_reduce_scatter(self, *args: Any) -> int:
        self.calls.append(args)
        _, source, to, count, _, _ = args
        at(to, count)[:] = 2 * at(source, 2 * count)[count:]  # as rank 1
        return self.status

    def cuda_broadcast(self, *args: Any) -> int:
        self.calls.append(args)
        _, data, count, _, root, _ = args
        at(data, count)[:] = 10 + root
        return self.status

    def cuda_all_reduce_rms_norm(self, *args: Any) -> int:
        self.calls.append(args)
        _, source, residual, weight, norm, total, rows, hidden, _, eps, bias, _ = args
        assert all(pointer % 16 == 0 for pointer in args[1:6])
        if rows * hidden == 0:
            return self.status
        value = (2 * at(source, rows * hidden) + at(residual, rows * hidden)).reshape(rows, hidden)
        root = 1 / numpy.sqrt((value**2).mean(1, keepdims=True) + eps)
        at(norm, rows * hidden)[:] = (value * root * (bias + at(weight, hidden))).reshape(-1)
        at(total, rows * hidden)[:] = value.reshape(-1)
        return self.status

    def cuda_barrier(self, *args: Any) -> int:
        self.calls.append(args)
        return self.status


def target(library: Library, **changes: Any) -> Target:
    settings = {
        "native": SimpleNamespace(
            **{name: getattr(library, name) for name in dir(library) if name.startswith("cuda_")}, cuda_tensor_all_reduce=None
        ),
        "handle": 5,
        "who": "[tp rank 1/2 custom_ar]",
        "device": torch.device("cpu"),
        "world_size": 2,
        "stream": lambda _index: STREAM,
        "settle": lambda: True,
        "fault": lambda: 0,
        "fail": lambda status: CommunicatorError(f"status {status}"),
    }
    return Target(**{**settings, **changes})  # type: ignore[arg-type]


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape) + 1


def layouts() -> dict[str, torch.Tensor]:
    plain = numbers(4, 6)
    return {
        "plain": plain,
        "transposed": numbers(6, 4).T,
        "strided": numbers(4, 12)[:, ::2],
        "cut from a row": numbers(4, 7)[:, 1:],
        "not on a vector": numbers(25)[1:].reshape(4, 6),
        "channels last": numbers(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        "negated": torch._neg_view(numbers(4, 6)),
        "with gradient": numbers(4, 6).requires_grad_(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 6),
    }


@pytest.mark.parametrize("layout", layouts())
def test_a_sum_of_any_layout_is_whole_in_place_and_out_of_place(layout: str) -> None:
    library = Library()
    calls, given = target(library), layouts()[layout]
    before = given.detach().clone().resolve_neg()
    out = calls.all_reduce(F32)(given)
    assert torch.equal(given, before)
    assert torch.equal(out, 2 * before)
    assert not out.requires_grad
    assert calls.all_reduce_(F32)(given) is given
    assert torch.equal(given, 2 * before)
    assert len(library.calls) == 2  # also with 0 elements: ranks stay in step
    for handle, _, _, count, dtype, stream in library.calls:
        assert (handle, count, dtype, stream) == (5, given.numel(), F32, STREAM)


@pytest.mark.parametrize("layout", sorted(set(layouts()) - {"scalar", "empty", "channels last"}))
def test_moves_and_norms_of_any_layout_are_whole(layout: str) -> None:
    library = Library()
    calls, given = target(library), layouts()[layout]
    x = given.detach().clone().resolve_neg()
    assert torch.equal(calls.all_gather(F32)(given), torch.cat([x, x]))
    assert torch.equal(calls.reduce_scatter(F32)(given), 2 * x[2:])
    weight, residual = numbers(7)[1:], numbers(6, 4).T  # neither lies where a vector can be read
    value = 2 * x + residual
    norm = value * (value.pow(2).mean(1, keepdim=True) + 0.5).rsqrt() * (1.0 + weight)
    got, total = calls.all_reduce_rms_norm(F32)(given, residual, weight, 0.5, 1.0)
    torch.testing.assert_close(got, norm)
    assert torch.equal(total, value)
    assert torch.equal(residual, numbers(6, 4).T)
    into, into_residual = layouts()[layout], residual.clone().T.contiguous().T
    pair = calls.all_reduce_rms_norm_(F32)(into, into_residual, weight, 0.5, 1.0)
    assert pair[0] is into
    assert pair[1] is into_residual
    torch.testing.assert_close(into.detach(), norm)
    assert torch.equal(into_residual, value)
    assert calls.broadcast(F32)(given, 1) is given
    assert torch.equal(given, torch.full((4, 6), 11.0))


def test_a_norm_of_no_rows_is_still_a_call() -> None:
    library = Library()
    norm, total = target(library).all_reduce_rms_norm(F32)(torch.empty(0, 8), torch.empty(0, 8), numbers(8), 1e-6, 0.0)
    assert norm.shape == total.shape == (0, 8)
    assert len(library.calls) == 1
    assert target(library).all_reduce_rms_norm(F32)(torch.empty(3, 0), torch.empty(3, 0), torch.empty(0), 1e-6, 0.0)[0].shape == (
        3,
        0,
    )
    assert library.calls[1][6:8] == (0, 0)


def every_call(calls: Target, tensor: torch.Tensor) -> list[Any]:
    weight = torch.ones(tensor.shape[-1])
    return [
        lambda: calls.all_reduce(F32)(tensor),
        lambda: calls.all_reduce_(F32)(tensor),
        lambda: calls.all_gather(F32)(tensor),
        lambda: calls.reduce_scatter(F32)(tensor),
        lambda: calls.broadcast(F32)(tensor, 0),
        lambda: calls.all_reduce_rms_norm(F32)(tensor, tensor, weight, 1e-6, 0.0),
        lambda: calls.all_reduce_rms_norm_(F32)(tensor, tensor, weight, 1e-6, 0.0),
    ]


def test_a_tensor_on_another_device_is_refused_before_anything_is_sent() -> None:
    library = Library()
    for call in every_call(target(library, device=torch.device("cuda:1")), torch.ones(4, 4)):
        with pytest.raises(UnsupportedOperation, match="wanted a tensor on cuda:1, found one on cpu"):
            call()
    assert not library.calls


def test_an_expanded_tensor_is_not_written_to() -> None:
    library = Library()
    calls, expanded = target(library), torch.ones(1, 4).expand(4, 4)
    for call in (lambda: calls.all_reduce_(F32)(expanded), lambda: calls.broadcast(F32)(expanded, 0)):
        with pytest.raises(UnsupportedOperation, match="can be written in place"):
            call()
    assert not library.calls
    assert torch.equal(calls.all_reduce(F32)(expanded), torch.full((4, 4), 2.0))


def test_a_status_of_any_call_is_raised_as_what_it_means() -> None:
    library = Library()
    library.status = -9
    calls = target(library)
    for call in (*every_call(calls, torch.ones(4, 4)), calls.barrier()):
        with pytest.raises(CommunicatorError, match="status -9"):
            call()


def test_a_barrier_waits_for_the_stream_and_then_looks_for_faults_but_not_in_a_capture() -> None:
    log: list[str] = []

    def settle(result: bool) -> Any:
        return lambda: log.append("settle") or result

    def fault() -> int:
        log.append("fault")
        return -9

    with pytest.raises(CommunicatorError, match="status -9"):
        target(Library(), settle=settle(True), fault=fault).barrier()()
    assert log == ["settle", "fault"]
    log.clear()
    target(Library(), settle=settle(False), fault=fault).barrier()()
    assert log == ["settle"]


def test_every_collective_of_the_spec_has_a_maker() -> None:
    (spec,) = (s for s in commplane_register_comm_backends() if s.device == "cuda")
    assert {c.value for c in spec.collectives()} <= {name for name in dir(Target) if not name.startswith("_")}
