"""Between torch's tensors, of any dtype and layout, and what a communicator moves. Everything here is local."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["bytes_of", "flat", "reals", "write", "write_flat", "write_reals"]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in one dense dimension, outside of autograd: its own memory where that is possible, else a copy."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def reals(tensor: torch.Tensor) -> torch.Tensor:
    """The same as real numbers, two for each complex one."""
    dense = flat(tensor)
    return torch.view_as_real(dense).view(-1) if dense.is_complex() else dense


def bytes_of(dense: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor of one dimension, as bytes: any dtype can be moved that way."""
    return dense.view(torch.uint8)


def write(target: torch.Tensor, value: torch.Tensor) -> None:
    """Copy, whatever the target is: a leaf that requires grad, a view, a tensor of inference mode."""
    target = target.detach()
    if target.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            target.copy_(value)
    else:
        target.copy_(value)


def write_flat(targets: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """Cut `values`, of one dimension, over `targets` in order; where two of them share memory the last one is seen."""
    start = 0
    for target in targets:
        count = target.numel()
        write(target, values[start : start + count].view(target.shape))
        start += count


def write_reals(targets: Sequence[torch.Tensor], values: torch.Tensor) -> None:
    """`write_flat` of what `reals` made."""
    start = 0
    for target in targets:
        count = target.numel() * (2 if target.is_complex() else 1)
        part = values[start : start + count]
        write(target, (torch.view_as_complex(part.view(-1, 2)) if target.is_complex() else part).view(target.shape))
        start += count
