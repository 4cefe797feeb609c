"""What the operators do while a graph is traced: shapes, dtypes and strides of results, and the errors that are known by then.

Nothing is sent. Shapes may be symbolic. What depends on the group, its size and what its plan serves, is read from the
communicator that the handle names: it has to be open when a graph is traced.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from commplane.api import Collective, QuantFormat, Quantization
from commplane.errors import CommunicatorError, UnsupportedOperation
from commplane.handles import find

__all__ = [
    "all_gather",
    "all_reduce",
    "all_reduce_",
    "all_reduce_rms_norm",
    "all_reduce_rms_norm_quant",
    "broadcast",
    "broadcast_",
    "reduce_scatter",
]


def _group(handle: str, collective: Collective, x: torch.Tensor, op: str | None = None) -> Any:
    """The communicator, if its plan has a route for a call of this kind at any size."""
    communicator = find(handle)
    if communicator.closed:
        raise CommunicatorError(f"{communicator.who} is closed: create it again, and compile again with the new one")
    dtype, plan = str(x.dtype).removeprefix("torch."), communicator.plan
    reduction = next((v for v in collective.variants if v is not None and v == op), None)
    served = (op is None or reduction is not None) and (
        plan.find(collective, reduction, dtype) or plan.composed(collective, reduction, dtype)
    )
    if not served:
        raise plan.unsupported(communicator.who, collective, op, dtype)
    return communicator


def _rows(communicator: Any, what: str, x: torch.Tensor) -> Any:
    if x.dim() == 0:
        raise UnsupportedOperation(f"{communicator.who} {what} wants a tensor with a first dimension, found a scalar")
    return x.shape[0]


def all_reduce(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """As the input."""
    _group(group, Collective.ALL_REDUCE, x, op)
    return x.new_empty(x.shape)


def all_reduce_(x: torch.Tensor, op: str, group: str) -> None:
    """No result."""
    _group(group, Collective.ALL_REDUCE, x, op)


def all_gather(x: torch.Tensor, group: str) -> torch.Tensor:
    """World size times the first dimension."""
    communicator = _group(group, Collective.ALL_GATHER, x)
    return x.new_empty((_rows(communicator, "all_gather", x) * communicator.world_size, *x.shape[1:]))


def reduce_scatter(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """The first dimension divided by the world size."""
    communicator = _group(group, Collective.REDUCE_SCATTER, x, op)
    rows, size = _rows(communicator, "reduce_scatter", x), communicator.world_size
    text = (
        f"{communicator.who} reduce_scatter wants a first dimension that {size} ranks divide, "
        f"found shape {[str(n) for n in x.shape]}: pad it"
    )
    if isinstance(rows, int) and rows % size:
        raise UnsupportedOperation(text)
    check: Any = torch._check
    check(rows % size == 0, lambda: text)  # symbolic: becomes a guard of the graph
    return x.new_empty((rows // size, *x.shape[1:]))


def broadcast(x: torch.Tensor, src: int, group: str) -> torch.Tensor:
    """As the input."""
    broadcast_(x, src, group)
    return x.new_empty(x.shape)


def broadcast_(x: torch.Tensor, src: int, group: str) -> None:
    """No result."""
    communicator = _group(group, Collective.BROADCAST, x)
    if not 0 <= src < communicator.world_size:
        raise UnsupportedOperation(
            f"{communicator.who} broadcast wants src as a group rank below {communicator.world_size}, found {src}"
        )


def all_reduce_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors as the input."""
    communicator = _group(group, Collective.ALL_REDUCE_RMS_NORM, x)
    _row_by_row(communicator, x, residual, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def all_reduce_rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    format: str,  # noqa: A002  the name in the schema
    size: int,
    eps: float,
    weight_bias: float,
    keep_norm: bool,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and scales as `commplane.api.quantize` has them, then two tensors as the input, the first empty unless kept."""
    communicator = _group(group, Collective.ALL_REDUCE_RMS_NORM_QUANT, x, format)
    _row_by_row(communicator, x, residual, weight)
    hidden, tokens = x.shape[-1], prod(x.shape[:-1])
    reason = Quantization(QuantFormat(format), scale, size).misfit(hidden)
    if reason is not None:
        raise UnsupportedOperation(f"{communicator.who} all_reduce_rms_norm_quant {reason}")
    values, scales = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(0, dtype=torch.float32)
    if format == QuantFormat.FP8_TOKEN:
        scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    elif format == QuantFormat.FP8_GROUP:
        shape, strides = (tokens, -(-hidden // (4 * size))), (1, -(-tokens // 4) * 4)
        scales = torch.empty_strided(shape, strides, dtype=torch.int32, device=x.device)
    elif format == QuantFormat.NVFP4:
        values = x.new_empty((*x.shape[:-1], hidden // 2), dtype=torch.uint8)
        scales = x.new_empty(-(-tokens // 128) * 128 * -(-hidden // 64) * 4, dtype=torch.uint8)
    return values, scales, x.new_empty(x.shape if keep_norm else 0), x.new_empty(x.shape)


def _row_by_row(communicator: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() == 0 or residual.shape != x.shape or weight.shape != x.shape[-1:]:
        raise UnsupportedOperation(
            f"{communicator.who} all_reduce_rms_norm wants a tensor of [..., hidden], a residual of that shape and a weight of "
            f"[hidden], found {', '.join(str([str(n) for n in t.shape]) for t in (x, residual, weight))}: reshape them"
        )
