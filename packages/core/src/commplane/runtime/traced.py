"""What `torch.compile` puts in the place of a communicator's methods: the operators of `commplane.ops`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from commplane.errors import UnsupportedOperation
from commplane.runtime.communicator import Communicator
from commplane.tracer import keep_out, trace_instead

if TYPE_CHECKING:
    import torch

    from commplane.api import Quantization, Quantized

__all__ = ["teach"]

# The operators are imported when the first graph is traced. `detach`: methods are outside of autograd, also in a graph (S11).


def all_reduce_(self: Communicator, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """In place."""
    from commplane import ops

    ops.all_reduce_(tensor.detach(), self.handle, op)
    return tensor


def all_reduce(self: Communicator, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Out of place."""
    from commplane import ops

    return ops.all_reduce(tensor.detach(), self.handle, op)


def all_gather(self: Communicator, tensor: torch.Tensor) -> torch.Tensor:
    """Out of place."""
    from commplane import ops

    return ops.all_gather(tensor.detach(), self.handle)


def reduce_scatter(self: Communicator, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Out of place."""
    from commplane import ops

    return ops.reduce_scatter(tensor.detach(), self.handle, op)


def broadcast(self: Communicator, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
    """In place."""
    from commplane import ops

    ops.broadcast_(tensor.detach(), self.handle, src)
    return tensor


def all_reduce_rms_norm(
    self: Communicator,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out of place."""
    from commplane import ops

    return ops.all_reduce_rms_norm(tensor.detach(), residual.detach(), weight.detach(), self.handle, eps, weight_bias)


def all_reduce_rms_norm_quant(
    self: Communicator,
    tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    how: Quantization,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    *,
    keep_norm: bool = False,
) -> tuple[Quantized, torch.Tensor | None, torch.Tensor]:
    """Out of place."""
    from commplane import ops

    return ops.all_reduce_rms_norm_quant(
        tensor.detach(), residual.detach(), weight.detach(), self.handle, how, eps, weight_bias, keep_norm=keep_norm
    )


def _outside(name: str) -> Callable[..., Any]:
    def method(self: Communicator, *_args: object, **_kwargs: object) -> Any:
        raise UnsupportedOperation(
            f"{self.who} {name} in a compiled function: call it outside, a graph only holds what has tensors"
        )

    return method


@cache
def teach() -> None:
    """Tell torch's tracer of the methods. Once, when the first communicator is made: torch is loaded by then."""
    outside = {name: _outside(name) for name in ("barrier", "prepare", "empty", "compare", "close")}
    inside = (all_reduce_, all_reduce, all_gather, reduce_scatter, broadcast, all_reduce_rms_norm, all_reduce_rms_norm_quant)
    for name, traced in (outside | {f.__name__: f for f in inside}).items():
        method = getattr(Communicator, name)
        trace_instead(method, traced)
        keep_out(method.__code__)
