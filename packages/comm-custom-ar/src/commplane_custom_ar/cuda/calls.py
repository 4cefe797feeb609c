# SPDX-License-Identifier: Apache-2.0
"""The data plane on CUDA: closures over native constants, one for each (collective, dtype). What is known once is looked up once.

Each is collective, queues its work on the current stream of the device and returns; only `barrier` waits. Tensors of any layout
are taken; one that the library cannot read as it is goes through a copy on the same stream.
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

__all__ = ["Norm", "Target", "current_stream"]

Norm = Callable[[Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]
"""(tensor, residual, weight, eps, weight_bias) -> the norm and the new residual."""

_VECTOR = 16  # bytes


def current_stream() -> Callable[[int], int]:
    """Number of a device -> torch's current stream there as a number. torch's own shortcut where it has one: 0.1 us, not 1."""
    shortcut: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return shortcut or (lambda index: int(torch.cuda.current_stream(index).cuda_stream))


@dataclass(frozen=True)
class Target:
    """What all calls of one communicator share.

    Attributes:
        native: the library.
        handle: of the communicator.
        who: how errors begin.
        device: of all tensors.
        world_size: number of ranks.
        stream: number of a device -> its current stream.
        settle: waits for the current stream, unless it captures; False if it does.
        fault: the status of a kernel that gave up, or 0.
        fail: how a status becomes an exception.
    """

    native: Native
    handle: int
    who: str
    device: torch.device
    world_size: int
    stream: Callable[[int], int]
    settle: Callable[[], bool]
    fault: Callable[[], int]
    fail: Callable[[int], CommunicatorError]

    @property
    def index(self) -> int:
        """Number of the device, as a tensor says it."""
        return self.device.index if self.device.type == "cuda" else -1

    def dense(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on the device."""
        if tensor.device != self.device:
            raise UnsupportedOperation(f"{self.who} wanted a tensor on {self.device}, found one on {tensor.device}")
        return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)

    def all_reduce_(self, dtype: int) -> Callable[[Tensor], Tensor]:
        """In place."""
        native, handle, fail, dense_of, who = self.native.cuda_all_reduce, self.handle, self.fail, self.dense, self.who
        index, stream = self.index, self.stream

        def all_reduce_(tensor: Tensor) -> Tensor:
            if tensor.get_device() != index or not tensor.is_contiguous() or tensor.is_neg():
                refuse_overlap(tensor, who)
                tensor.detach().copy_(all_reduce_(dense_of(tensor)))
                return tensor
            pointer = tensor.data_ptr()
            status = native(handle, pointer, pointer, tensor.numel(), dtype, stream(index))
            if status:
                raise fail(status)
            return tensor

        return self._in_one_call(all_reduce_, dtype, in_place=True)

    def all_reduce(self, dtype: int) -> Callable[[Tensor], Tensor]:
        """Into a new tensor."""
        native, handle, fail, dense_of, empty_like = (
            self.native.cuda_all_reduce,
            self.handle,
            self.fail,
            self.dense,
            torch.empty_like,
        )
        index, stream, in_place = self.index, self.stream, self.all_reduce_(dtype)

        def all_reduce(tensor: Tensor) -> Tensor:
            if tensor.get_device() != index or not tensor.is_contiguous() or tensor.is_neg():
                return in_place(dense_of(tensor))
            out = empty_like(tensor)  # never requires grad: collectives happen outside of autograd
            status = native(handle, tensor.data_ptr(), out.data_ptr(), tensor.numel(), dtype, stream(index))
            if status:
                raise fail(status)
            return out

        return self._in_one_call(all_reduce, dtype, in_place=False)

    def _in_one_call(self, call: Callable[[Tensor], Tensor], dtype: int, *, in_place: bool) -> Callable[[Tensor], Tensor]:
        """`call` as one C function, where torch has DLPack's (2.10 and later); what that leaves aside goes to `call`."""
        make = self.native.cuda_tensor_all_reduce if self.device.type == "cuda" else None
        return (make and make(torch, self.handle, dtype, self.index, in_place, call, self.fail)) or call

    def all_gather(self, dtype: int) -> Callable[[Tensor], Tensor]:
        """Concatenated along dimension 0."""
        native, handle, fail, n = self.native.cuda_all_gather, self.handle, self.fail, self.world_size
        index, stream, plain = self.index, self.stream, self._plain

        def all_gather(tensor: Tensor) -> Tensor:
            tensor = plain(tensor)
            shape = tensor.shape
            out = tensor.new_empty((n * shape[0], *shape[1:]))
            status = native(handle, tensor.data_ptr(), out.data_ptr(), tensor.numel(), dtype, stream(index))
            if status:
                raise fail(status)
            return out

        return all_gather

    def reduce_scatter(self, dtype: int) -> Callable[[Tensor], Tensor]:
        """Cut along dimension 0, which the world size divides."""
        native, handle, fail, n = self.native.cuda_reduce_scatter, self.handle, self.fail, self.world_size
        index, stream, plain = self.index, self.stream, self._plain

        def reduce_scatter(tensor: Tensor) -> Tensor:
            tensor = plain(tensor)
            shape = tensor.shape
            out = tensor.new_empty((shape[0] // n, *shape[1:]))
            status = native(handle, tensor.data_ptr(), out.data_ptr(), out.numel(), dtype, stream(index))
            if status:
                raise fail(status)
            return out

        return reduce_scatter

    def broadcast(self, dtype: int) -> Callable[[Tensor, int], Tensor]:
        """In place from a group rank."""
        native, handle, fail, who = self.native.cuda_broadcast, self.handle, self.fail, self.who
        index, stream, plain = self.index, self.stream, self._plain

        def broadcast(tensor: Tensor, src: int) -> Tensor:
            to = plain(tensor)
            if to is not tensor:
                refuse_overlap(tensor, who)
            status = native(handle, to.data_ptr(), to.numel(), dtype, src, stream(index))
            if status:
                raise fail(status)
            if to is not tensor:
                tensor.detach().copy_(to)
            return tensor

        return broadcast

    def all_reduce_rms_norm(self, dtype: int) -> Norm:
        """The norm and the new residual, as new tensors."""
        fused, plain, empty_like = self._fused_norm(dtype), self._aligned, torch.empty_like

        def all_reduce_rms_norm(
            tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            tensor, residual = plain(tensor), plain(residual)
            return fused(tensor, residual, weight, empty_like(tensor), empty_like(tensor), eps, weight_bias)

        return all_reduce_rms_norm

    def all_reduce_rms_norm_(self, dtype: int) -> Norm:
        """The norm into the tensor, the new residual into the residual."""
        fused, plain = self._fused_norm(dtype), self._aligned

        def all_reduce_rms_norm_(
            tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            to, total = plain(tensor), plain(residual)
            fused(to, total, weight, to, total, eps, weight_bias)
            if to is not tensor:
                tensor.detach().copy_(to)
            if total is not residual:
                residual.detach().copy_(total)
            return tensor, residual

        return all_reduce_rms_norm_

    def _fused_norm(self, dtype: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """The native call for tensors that it can read, into tensors that it can write."""
        native, handle, fail, plain = self.native.cuda_all_reduce_rms_norm, self.handle, self.fail, self._aligned
        index, stream = self.index, self.stream

        def fused(
            tensor: Tensor, residual: Tensor, weight: Tensor, norm: Tensor, total: Tensor, eps: float, weight_bias: float
        ) -> tuple[Tensor, Tensor]:
            weight = plain(weight)
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
                stream(index),
            )
            if status:
                raise fail(status)
            return norm, total

        return fused

    def barrier(self) -> Callable[[], Any]:
        """Return when all ranks have come here; inside a capture, put a barrier into the graph."""
        native, handle, index, stream = self.native.cuda_barrier, self.handle, self.index, self.stream
        settle, fault, fail = self.settle, self.fault, self.fail

        def barrier() -> None:
            status = native(handle, stream(index)) or (settle() and fault())
            if status:
                raise fail(status)

        return barrier

    def _plain(self, tensor: Tensor) -> Tensor:
        """It, where its memory is what it shows, or a copy."""
        if tensor.get_device() != self.index or not tensor.is_contiguous() or tensor.is_neg():
            return self.dense(tensor)
        return tensor

    def _aligned(self, tensor: Tensor) -> Tensor:
        """It, where the fused kernel can read it in vectors too, or a copy."""
        plain = self._plain(tensor)
        return plain if plain.data_ptr() % _VECTOR == 0 else self.dense(plain)
