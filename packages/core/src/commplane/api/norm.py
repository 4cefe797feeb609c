"""What follows the all-reduce in `all_reduce_rms_norm`, in plain torch: the reference, and what runs where nothing is fused.

A fused kernel is measured against an all-reduce and this, so this has no handicap: what can be is done in place, and a large
tensor goes block by block, each through all its passes while it is in cache.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["add_rms_norm"]

# Elements of a block on CPU; of 2^15 to 2^18 these were the fastest at hidden 4096 from 256 KiB to 64 MiB. Dtypes of 16 bits need
# two buffers of float32 a block, and where those are larger the pages that malloc gives back and faults in again cost most.
_BLOCK = 1 << 18
_BLOCK_NARROW = 1 << 17
# Up to here torch's own rms_norm, the same steps in one call, was faster on CPU; on other devices it is at every size.
_ONE_CALL = 1 << 15


def add_rms_norm(total: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float = 0.0) -> tuple[Tensor, Tensor]:
    """``v = round(total + residual)`` and ``round(v * rsqrt(mean(v^2) + eps) * (weight_bias + weight))``. Local.

    Rounded to the dtype at these two places; all else is float32, or float64 for float64. The mean is over the last dimension.
    With an `eps` of 0 a row of zeros gives NaN.

    Args:
        total: what the all-reduce gave, ``[..., hidden]``. Used up: where it is contiguous, it becomes the second result.
        residual: of the same shape and dtype.
        weight: ``[hidden]``, of the same dtype.
        eps: added to the mean square.
        weight_bias: added to the weight; 1.0 is Gemma's.

    Returns:
        The norm, and ``v``, the new residual. Neither requires grad.
    """
    import torch

    # Collectives are outside of autograd. To look is cheaper than `no_grad`, and mostly only the weight has to be detached.
    if weight.requires_grad:
        weight = weight.detach()
    if residual.requires_grad:
        residual = residual.detach()
    total = total.detach().contiguous() if total.requires_grad else total.contiguous()
    narrow = total.itemsize < 4
    one_call = not total.is_cpu or total.numel() <= _ONE_CALL
    if one_call and not weight_bias and (not narrow or _rounds_once(total.device.type)):
        total.add_(residual)
        return torch.rms_norm(total, total.shape[-1:], weight, eps), total
    scale = weight.float() if narrow else weight
    if weight_bias:
        scale = scale + weight_bias
    norm = torch.empty_like(total)
    block = (_BLOCK_NARROW if narrow else _BLOCK) if total.is_cpu else total.numel()
    if total.numel() <= block:
        total.add_(residual)
        wide = total.float() if narrow else total
        _normalise(wide, torch.empty_like(wide) if narrow else norm, norm, scale, eps)
        return norm, total
    hidden = total.shape[-1]
    rows = max(1, block // hidden)
    # On CPU: elsewhere all is one block.
    wide, squares = torch.empty((2, rows, hidden), dtype=torch.float32) if narrow else (norm, norm)
    parts = (torch.split(t.reshape(-1, hidden), rows) for t in (total, residual, norm))
    for v, r, out in zip(*parts, strict=True):
        v.add_(r)
        if narrow:
            _normalise(wide[: len(v)].copy_(v), squares[: len(v)], out, scale, eps)
        else:
            _normalise(v, out, out, scale, eps)
    return norm, total


def _normalise(v: Tensor, squares: Tensor, out: Tensor, scale: Tensor, eps: float) -> None:
    """Fill `out`. `v` is wide; `squares` is scratch of its dtype and, where nothing is narrowed, `out` itself."""
    import torch

    torch.mul(v, v, out=squares)
    inverse = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    if squares is out:
        torch.mul(v, inverse, out=out).mul_(scale)
    else:
        out.copy_(v.mul_(inverse).mul_(scale))


@cache
def _rounds_once(device: str) -> bool:
    """Whether this torch's rms_norm rounds dtypes of 16 bits at the end only; that of 2.4 does before the weight too."""
    import torch

    if device != "cpu":  # not tried out, as this may be asked inside of a capture: one kernel does all, or a row of them
        fused = device == "cuda" and hasattr(torch.ops.aten, "_fused_rms_norm")
        return fused and torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", "CUDA")
    v = torch.tensor([1.0, 5.0], dtype=torch.bfloat16, device="cpu")  # where it makes a difference
    wanted = (v.float() * v.float().square().mean().rsqrt() * 7.0).bfloat16()
    return torch.equal(torch.rms_norm(v, v.shape, torch.full_like(v, 7.0), 0.0), wanted)
