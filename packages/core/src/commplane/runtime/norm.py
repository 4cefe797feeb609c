"""What `all_reduce_rms_norm` may be given: looked at before anything is sent, on every call, and so in few steps."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from commplane.api import Quantization

__all__ = ["fits", "misfit", "quantizes"]


def fits(tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float) -> bool:
    """Whether the arguments go together. Local. Whether they are on the group's device, the backends say."""
    shape, dtype = tensor.shape, tensor.dtype
    return (
        len(shape) > 0
        and dtype.is_floating_point
        and residual.shape == shape
        and weight.shape == (shape[-1],)
        and residual.dtype is dtype is weight.dtype
        and ((tensor.is_cpu and residual.is_cpu and weight.is_cpu) or residual.device == tensor.device == weight.device)
        and residual.layout is tensor.layout is weight.layout
        and 0.0 <= eps < inf
        and -inf < weight_bias < inf
    )


def quantizes(tensor: Tensor, how: Quantization) -> bool:
    """Whether a tensor that fits can be quantised that way. Local."""
    scale = how.scale
    return how.misfit(tensor.shape[-1]) is None and (
        scale is None
        or (scale.numel() == 1 and scale.is_floating_point() and scale.itemsize == 4 and scale.device == tensor.device)
    )


def misfit(
    tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float, how: Quantization | None = None
) -> str:
    """Of arguments that do not fit, the first thing that is wrong: what was wanted, what was found, what to do."""
    if not tensor.shape:
        return "wants a tensor of [..., hidden], found a scalar: reshape it to one dimension"
    if not tensor.dtype.is_floating_point:
        return f"wants a floating-point dtype, found {tensor.dtype}: convert the tensor"
    shape, hidden = list(tensor.shape), list(tensor.shape[-1:])
    for name, other, wanted in (("residual", residual, shape), ("weight", weight, hidden)):
        if list(other.shape) != wanted:
            return f"wants a {name} of shape {wanted} with a tensor of {shape}, found {list(other.shape)}: reshape or expand it"
        for what in ("dtype", "device", "layout"):
            of_tensor, found = getattr(tensor, what), getattr(other, what)
            if of_tensor != found:
                return f"wants a {name} of {what} {of_tensor}, that of the tensor, found {found}: convert it"
    if not 0.0 <= eps < inf:
        return f"wants a finite eps of 0 or more, found {eps}: take the model's"
    if how is None or not -inf < weight_bias < inf:
        return f"wants a finite weight_bias, such as 0.0 or 1.0, found {weight_bias}: take the model's"
    reason = how.misfit(hidden[0])
    if reason is not None:
        return reason
    assert how.scale is not None
    return (
        f"wants a scale of one float32 on {tensor.device}, found {list(how.scale.shape)} of {how.scale.dtype} on "
        f"{how.scale.device}: make it once, outside of the call"
    )
