"""What the operators do on CPU and CUDA: call the communicator that the handle names.

Collective over its group, each of them. An operator's result is a new contiguous tensor, whatever the strides of its input and
whichever backend runs: compiled code relies on that, a communicator's method does not promise it (S7).
"""

from __future__ import annotations

import torch

from commplane.api import QuantFormat, Quantization
from commplane.handles import LIVE

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


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def all_reduce(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """Reduce over the ranks."""
    return _contiguous(LIVE[group]().all_reduce(x, op))


def all_reduce_(x: torch.Tensor, op: str, group: str) -> None:
    """Reduce over the ranks, in place."""
    LIVE[group]().all_reduce_(x, op)


def all_gather(x: torch.Tensor, group: str) -> torch.Tensor:
    """The ranks' tensors, concatenated along dimension 0."""
    return _contiguous(LIVE[group]().all_gather(x))


def reduce_scatter(x: torch.Tensor, op: str, group: str) -> torch.Tensor:
    """This rank's part of the reduced tensor, cut along dimension 0."""
    return _contiguous(LIVE[group]().reduce_scatter(x, op))


def broadcast(x: torch.Tensor, src: int, group: str) -> torch.Tensor:
    """The tensor of group rank `src`; `x` is left as it was."""
    return LIVE[group]().broadcast(x.detach().clone(memory_format=torch.contiguous_format), src)  # type: ignore[no-any-return]


def broadcast_(x: torch.Tensor, src: int, group: str) -> None:
    """Fill `x` from group rank `src`."""
    LIVE[group]().broadcast(x, src)


def all_reduce_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm and the new residual."""
    norm, total = LIVE[group]().all_reduce_rms_norm(x, residual, weight, eps, weight_bias)
    return _contiguous(norm), _contiguous(total)


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
    """The quantised norm and its scales, the norm (empty unless kept) and the new residual.

    A result must not be an input: a given scale is not handed back, nothing stands in its place.
    """
    how = Quantization(QuantFormat(format), scale, size)
    out, norm, total = LIVE[group]().all_reduce_rms_norm_quant(x, residual, weight, how, eps, weight_bias, keep_norm=keep_norm)
    scales = x.new_empty(0, dtype=torch.float32) if out.scales is scale else out.scales
    return _contiguous(out.values), scales, x.new_empty(0) if norm is None else _contiguous(norm), _contiguous(total)
