# SPDX-License-Identifier: Apache-2.0
"""The data plane: closures over native constants, one for each (collective, op, dtype). What is known once is looked up once.

Each is collective and takes tensors of any layout on the CPU; one that the library cannot read as it is goes through a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from commplane.api import refuse_overlap
from commplane.errors import CommunicatorError, UnsupportedOperation
from commplane_custom_ar._library import Native

__all__ = ["Norm", "Target"]

Norm = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""(tensor, residual, weight, eps, weight_bias) -> the norm and the new residual."""


def _plain(tensor: Tensor) -> bool:
    """Whether its memory is what it shows: the library reads it as it is."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


@dataclass(frozen=True)
class Target:
    """What all calls of one communicator share: the library, the native handle, and how a status becomes an exception."""

    native: Native
    handle: int
    who: str
    rank: int
    world_size: int
    fail: Callable[[int], CommunicatorError]

    def dense(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a CPU tensor."""
        if not tensor.is_cpu:
            raise UnsupportedOperation(f"{self.who} wanted a tensor on cpu, found one on {tensor.device}")
        return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)

    def all_reduce_(self, dtype: int, op: int) -> Callable[[Tensor], Tensor]:
        """In place."""
        native, handle, fail, dense_of, who = self.native.all_reduce, self.handle, self.fail, self.dense, self.who

        def all_reduce_(tensor: Tensor) -> Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                refuse_overlap(tensor, who)
                tensor.detach().copy_(all_reduce_(dense_of(tensor)))
                return tensor
            pointer = tensor.data_ptr()
            status = native(handle, pointer, pointer, tensor.numel(), dtype, op)
            if status:
                raise fail(status)
            return tensor

        return self._in_one_call(all_reduce_, dtype, op, in_place=True)

    def all_reduce(self, dtype: int, op: int) -> Callable[[Tensor], Tensor]:
        """Into a new tensor."""
        native, handle, fail, dense_of, empty_like = self.native.all_reduce, self.handle, self.fail, self.dense, torch.empty_like
        in_place = self.all_reduce_(dtype, op)

        def all_reduce(tensor: Tensor) -> Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                return in_place(dense_of(tensor))
            out = empty_like(tensor)  # never requires grad: collectives happen outside of autograd
            status = native(handle, tensor.data_ptr(), out.data_ptr(), tensor.numel(), dtype, op)
            if status:
                raise fail(status)
            return out

        return self._in_one_call(all_reduce, dtype, op, in_place=False)

    def _in_one_call(
        self, call: Callable[[Tensor], Tensor], dtype: int, op: int, *, in_place: bool
    ) -> Callable[[Tensor], Tensor]:
        """`call` as one C function, where torch has DLPack's (2.10 and later); what that leaves aside goes to `call`."""
        make = self.native.tensor_all_reduce
        return (make and make(torch, self.handle, dtype, op, in_place, call, self.fail)) or call

    def all_gather(self, dtype: int) -> Callable[[Tensor], Tensor]:
        """Concatenated along dimension 0."""
        native, handle, fail, n = self.native.all_gather, self.handle, self.fail, self.world_size

        def all_gather(tensor: Tensor) -> Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                tensor = self.dense(tensor)
            shape = tensor.shape
            out = tensor.new_empty((n * shape[0], *shape[1:]))
            status = native(handle, tensor.data_ptr(), out.data_ptr(), tensor.numel(), dtype)
            if status:
                raise fail(status)
            return out

        return all_gather

    def reduce_scatter(self, dtype: int, op: int) -> Callable[[Tensor], Tensor]:
        """Cut along dimension 0, which the world size divides."""
        native, handle, fail, n = self.native.reduce_scatter, self.handle, self.fail, self.world_size

        def reduce_scatter(tensor: Tensor) -> Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                tensor = self.dense(tensor)
            shape = tensor.shape
            out = tensor.new_empty((shape[0] // n, *shape[1:]))
            status = native(handle, tensor.data_ptr(), out.data_ptr(), out.numel(), dtype, op)
            if status:
                raise fail(status)
            return out

        return reduce_scatter

    def broadcast(self, dtype: int) -> Callable[[Tensor, int], Tensor]:
        """In place from a group rank."""
        native, handle, fail, who = self.native.broadcast, self.handle, self.fail, self.who

        def broadcast(tensor: Tensor, src: int) -> Tensor:
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                refuse_overlap(tensor, who)
                dense = broadcast(self.dense(tensor), src)
                tensor.detach().copy_(dense)
                return tensor
            status = native(handle, tensor.data_ptr(), tensor.numel(), dtype, src)
            if status:
                raise fail(status)
            return tensor

        return broadcast

    def all_reduce_rms_norm(self, dtype: int) -> Norm:
        """The norm and the new residual, as new tensors."""
        fused, empty_like = self._fused_norm(dtype), torch.empty_like

        def all_reduce_rms_norm(
            tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            tensor = tensor if _plain(tensor) else self.dense(tensor)
            residual = residual if _plain(residual) else self.dense(residual)
            return fused(tensor, residual, weight, empty_like(tensor), empty_like(tensor), eps, weight_bias)

        return all_reduce_rms_norm

    def all_reduce_rms_norm_(self, dtype: int) -> Norm:
        """The norm into the tensor, the new residual into the residual."""
        fused = self._fused_norm(dtype)

        def all_reduce_rms_norm_(
            tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            to = tensor if _plain(tensor) else self.dense(tensor)
            total = residual if _plain(residual) else self.dense(residual)
            fused(to, total, weight, to, total, eps, weight_bias)
            if to is not tensor:
                tensor.detach().copy_(to)
            if total is not residual:
                residual.detach().copy_(total)
            return tensor, residual

        return all_reduce_rms_norm_

    def _fused_norm(self, dtype: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """The native call for tensors that it can read, into tensors that it can write."""
        native, handle, fail = self.native.all_reduce_rms_norm, self.handle, self.fail

        def fused(
            tensor: Tensor, residual: Tensor, weight: Tensor, norm: Tensor, total: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            weight = weight if _plain(weight) else self.dense(weight)
            hidden = tensor.shape[-1]
            status = native(
                handle,
                tensor.data_ptr(),
                residual.data_ptr(),
                weight.data_ptr(),
                norm.data_ptr(),
                total.data_ptr(),
                tensor.numel() // hidden if hidden else 0,
                hidden,
                dtype,
                eps,
                weight_bias,
            )
            if status:
                raise fail(status)
            return norm, total

        return fused

    def barrier(self) -> Callable[[], Any]:
        """Return when all ranks have come here."""
        native, handle, fail = self.native.barrier, self.handle, self.fail

        def barrier() -> None:
            status = native(handle)
            if status:
                raise fail(status)

        return barrier
