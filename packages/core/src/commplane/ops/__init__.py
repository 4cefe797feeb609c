"""Collectives as PyTorch operators, ``torch.ops.commplane.*``: for `torch.compile`, and for autograd.

Importing this imports torch and registers the operators. Each function takes a communicator or its `handle`, is collective over
the group, and may be compiled with ``fullgraph=True``. A communicator's own methods may be as well; they stay outside of autograd
there too (S11). In eager code they are the cheaper call, because they do not go through torch's dispatcher.

What differs from the methods: results of functions without an underscore are new and contiguous; gradients are communicated; an
operator without a gradient refuses a tensor that requires one, with `UnsupportedOperation`, instead of cutting it off.
"""

from __future__ import annotations

import torch

from commplane.api import QuantFormat, Quantization, Quantized
from commplane.handles import HasHandle, handle_of
from commplane.ops import gradients
from commplane.ops.library import register

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "all_reduce_rms_norm",
    "all_reduce_rms_norm_quant",
    "broadcast",
    "broadcast_",
    "copy_to_group",
    "reduce_from_group",
    "reduce_scatter",
]

register()

_all_gather = torch.ops.commplane.all_gather.default
_all_reduce = torch.ops.commplane.all_reduce.default
_all_reduce_ = torch.ops.commplane.all_reduce_.default
_all_reduce_rms_norm = torch.ops.commplane.all_reduce_rms_norm.default
_all_reduce_rms_norm_quant = torch.ops.commplane.all_reduce_rms_norm_quant.default
_broadcast = torch.ops.commplane.broadcast.default
_broadcast_ = torch.ops.commplane.broadcast_.default
_reduce_scatter = torch.ops.commplane.reduce_scatter.default


def all_reduce(x: torch.Tensor, comm: HasHandle | str, op: str = "sum") -> torch.Tensor:
    """Reduce over the ranks with sum, min, max or avg. The gradient of sum and avg is the same all-reduce of the gradients.

    Raises:
        UnsupportedOperation: min or max of a tensor that requires grad, or what the communicator itself refuses.
        CommunicatorError: no open communicator has this handle.
    """
    return _all_reduce(x, op, handle_of(comm))  # type: ignore[no-any-return]


def all_reduce_(x: torch.Tensor, comm: HasHandle | str, op: str = "sum") -> torch.Tensor:
    """Reduce in place; returns `x`, which must not require grad."""
    _all_reduce_(x, op, handle_of(comm))
    return x


def all_gather(x: torch.Tensor, comm: HasHandle | str) -> torch.Tensor:
    """The ranks' tensors, concatenated along dimension 0. The gradient is the reduce-scatter of the gradients."""
    return _all_gather(x, handle_of(comm))  # type: ignore[no-any-return]


def reduce_scatter(x: torch.Tensor, comm: HasHandle | str, op: str = "sum") -> torch.Tensor:
    """This rank's part of the reduced tensor, cut along dimension 0. The gradient is the all-gather of the gradients."""
    return _reduce_scatter(x, op, handle_of(comm))  # type: ignore[no-any-return]


def broadcast(x: torch.Tensor, comm: HasHandle | str, src: int = 0) -> torch.Tensor:
    """The tensor of group rank `src`, as a new tensor. Has no gradient."""
    return _broadcast(x, src, handle_of(comm))  # type: ignore[no-any-return]


def broadcast_(x: torch.Tensor, comm: HasHandle | str, src: int = 0) -> torch.Tensor:
    """Fill `x` from group rank `src`; returns `x`, which must not require grad."""
    _broadcast_(x, src, handle_of(comm))
    return x


def all_reduce_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    comm: HasHandle | str,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`Communicator.all_reduce_rms_norm`: the norm and the new residual. For inference: it has no gradient."""
    return _all_reduce_rms_norm(x, residual, weight, eps, weight_bias, handle_of(comm))  # type: ignore[no-any-return]


def all_reduce_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    comm: HasHandle | str,
    how: Quantization,
    eps: float = 1e-6,
    weight_bias: float = 0.0,
    *,
    keep_norm: bool = False,
) -> tuple[Quantized, torch.Tensor | None, torch.Tensor]:
    """`Communicator.all_reduce_rms_norm_quant`. For inference: it has no gradient."""
    values, scales, norm, total = _all_reduce_rms_norm_quant(
        x, residual, weight, how.scale, str(how.format), how.group, eps, weight_bias, keep_norm, handle_of(comm)
    )
    if how.format is QuantFormat.FP8_STATIC:  # the operator cannot hand back what it was given
        scales = how.scale
    return Quantized(how.format, values, scales), norm if keep_norm else None, total


def copy_to_group(x: torch.Tensor, comm: HasHandle | str) -> torch.Tensor:
    """Where a tensor that is equal on all ranks enters a part that is split over them: gives `x`, and sums its gradient.

    Before a column-parallel layer. Nothing is sent in the forward pass.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return gradients.copy_to_group(x, handle_of(comm))  # type: ignore[no-any-return]
    return x


def reduce_from_group(x: torch.Tensor, comm: HasHandle | str) -> torch.Tensor:
    """Where such a part ends: the sum of the ranks' tensors, and the gradient as it comes, which is equal on all ranks.

    After a row-parallel layer. Nothing is sent in the backward pass.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return gradients.reduce_from_group(x, handle_of(comm))  # type: ignore[no-any-return]
    return _all_reduce(x, "sum", handle_of(comm))  # type: ignore[no-any-return]
