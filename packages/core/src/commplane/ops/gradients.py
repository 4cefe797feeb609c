"""Gradients of the operators: the transpose of what each does to the tensors of all ranks together.

That is what autograd needs where every rank goes on with its own result: the loss is then the sum of what the ranks compute. The
backward pass communicates too, so every rank of the group takes part in it, in the same order.
"""

from __future__ import annotations

from typing import Any

import torch

from commplane.api import ReduceOp
from commplane.errors import UnsupportedOperation
from commplane.handles import find

__all__ = ["all_gather", "all_reduce", "copy_to_group", "reduce_from_group", "reduce_scatter"]

_ops = torch.ops.commplane


def _check_linear(what: str, op: str) -> None:
    if op not in (ReduceOp.SUM, ReduceOp.AVG):
        raise UnsupportedOperation(
            f"{what} of a tensor that requires grad wants op sum or avg, found {op!r}, which has no gradient: detach the tensor"
        )


class _AllReduce(torch.autograd.Function):
    """Backward: the same all-reduce of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: str, group: str) -> torch.Tensor:
        """Reduce over the ranks."""
        _check_linear("all_reduce", op)
        ctx.op, ctx.group = op, group
        return _ops.all_reduce(x, op, group)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """For x, op and group."""
        return _ops.all_reduce(gradient, ctx.op, ctx.group), None, None


class _AllGather(torch.autograd.Function):
    """Backward: this rank's part of the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        """Concatenate along dimension 0."""
        ctx.group = group
        return _ops.all_gather(x, group)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """For x and group."""
        return _ops.reduce_scatter(gradient, "sum", ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Backward: the gradients of all parts, concatenated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: str, group: str) -> torch.Tensor:
        """This rank's part of the reduced tensor."""
        _check_linear("reduce_scatter", op)
        ctx.group, ctx.parts = group, find(group).world_size if op == ReduceOp.AVG else 1
        return _ops.reduce_scatter(x, op, group)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """For x, op and group."""
        part = gradient if ctx.parts == 1 else gradient / ctx.parts
        return _ops.all_gather(part, ctx.group), None, None


class _CopyToGroup(torch.autograd.Function):
    """Forward: nothing, the ranks hold equal tensors. Backward: the sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        """The tensor itself, as a view."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """For x and group."""
        return _ops.all_reduce(gradient, "sum", ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    """Forward: the sum over the ranks. Backward: nothing, the gradients are equal on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        """Reduce over the ranks."""
        return _ops.all_reduce(x, "sum", group)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """For x and group."""
        return gradient, None


# What is called, with the arguments of `forward` but `ctx`. Any: torch does not type it.
all_gather: Any = _AllGather.apply
all_reduce: Any = _AllReduce.apply
copy_to_group: Any = _CopyToGroup.apply
reduce_from_group: Any = _ReduceFromGroup.apply
reduce_scatter: Any = _ReduceScatter.apply
