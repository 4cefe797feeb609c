"""The operators' schemas, and their registration with torch's dispatcher.

Where a call wants no gradient and nobody else looks at it, which is each call of an eager inference, the kernel at the key
Autograd goes straight to the one that communicates. `torch.library.register_autograd` dispatches a second time instead, and
`torch.library.custom_op` wraps more around it; benchmarks/op_dispatch.py has what each costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _AutoDispatchBelowAutograd
from torch.autograd.graph import increment_version

from commplane.errors import UnsupportedOperation
from commplane.ops import fake, gradients, kernels
from commplane.tracer import keep_out

__all__ = ["PLAIN", "SCHEMAS", "register"]

SCHEMAS = {
    "all_reduce": "(Tensor x, str op, str group) -> Tensor",
    "all_reduce_": "(Tensor(a!) x, str op, str group) -> ()",
    "all_gather": "(Tensor x, str group) -> Tensor",
    "reduce_scatter": "(Tensor x, str op, str group) -> Tensor",
    "broadcast": "(Tensor x, int src, str group) -> Tensor",
    "broadcast_": "(Tensor(a!) x, int src, str group) -> ()",
    "all_reduce_rms_norm": (
        "(Tensor x, Tensor residual, Tensor weight, float eps, float weight_bias, str group) -> (Tensor, Tensor)"
    ),
    "all_reduce_rms_norm_quant": (
        "(Tensor x, Tensor residual, Tensor weight, Tensor? scale, str format, int size, float eps, float weight_bias, "
        "bool keep_norm, str group) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}
"""`op` is sum, min, max or avg; `src` a group rank; `group` the handle of a communicator."""

_DIFFERENTIABLE = {
    "all_reduce": gradients.all_reduce,
    "all_gather": gradients.all_gather,
    "reduce_scatter": gradients.reduce_scatter,
}

PLAIN = tuple(
    DispatchKeySet(getattr(DispatchKey, device)) | DispatchKeySet(getattr(DispatchKey, f"Autograd{device}"))
    for device in ("CPU", "CUDA")
)
"""The dispatch keys of a call on ordinary tensors: no mode, no functionalization, no transform. Any other takes the long way."""

Kernel = Callable[..., Any]


def _refuse(name: str) -> Kernel:
    """What takes the place of a gradient where there is none."""
    instead = {
        "all_reduce_": "commplane.ops.all_reduce",
        "all_reduce_rms_norm": "commplane.ops.all_reduce and torch's rms_norm",
        "all_reduce_rms_norm_quant": "commplane.ops.all_reduce and torch's rms_norm",
    }.get(name, "commplane.ops.all_gather")

    def refuse(*_args: object) -> Any:
        raise UnsupportedOperation(f"{name} has no gradient, found a tensor that requires grad: detach it, or use {instead}")

    return refuse


def _autograd_kernel(name: str, kernel: Kernel) -> Kernel:
    """The kernel at the key Autograd, which every call outside of inference mode meets first."""
    op = getattr(torch.ops.commplane, name).default
    differentiable = _DIFFERENTIABLE.get(name) or _refuse(name)
    grad_mode = torch.is_grad_enabled
    below_autograd: Any = _AutoDispatchBelowAutograd

    def functional(keys: DispatchKeySet, x: torch.Tensor, *rest: Any) -> Any:
        if x.requires_grad and grad_mode():
            return differentiable(x, *rest)
        if keys in PLAIN:
            return kernel(x, *rest)
        with below_autograd():
            return op(x, *rest)

    def in_place(keys: DispatchKeySet, x: torch.Tensor, *rest: Any) -> None:
        if x.requires_grad and grad_mode():
            differentiable()
        if keys in PLAIN:
            kernel(x, *rest)
        else:
            with below_autograd():
                op(x, *rest)
        increment_version(x)  # autograd must see that a tensor it may have saved has changed

    def fused(keys: DispatchKeySet, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
        if (residual.requires_grad or weight.requires_grad) and grad_mode():
            differentiable()
        return functional(keys, x, residual, weight, *rest)

    if name.startswith("all_reduce_rms_norm"):
        return fused
    return in_place if name.endswith("_") else functional


def register() -> None:
    """Make ``torch.ops.commplane``, once in a process: a second import or a reload of these modules finds it there."""
    namespace: Any = torch.ops.commplane
    if hasattr(namespace, "commplane_library"):
        return
    library: Any = torch.library.Library("commplane", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        kernel = getattr(kernels, name)
        for device in ("CPU", "CUDA"):
            library.impl(name, kernel, device)
        autograd = _autograd_kernel(name, kernel)
        library.impl(name, autograd, "Autograd", with_keyset=True)
        keep_out(kernel.__code__, autograd.__code__)
        torch.library.register_fake(f"commplane::{name}", getattr(fake, name), lib=library)
    # The operators go with the library object, so it lives where they do and not in a module that can be imported anew.
    namespace.commplane_library = library
