"""The calls of a communicator that norm what was summed; what they may be given is checked before anything is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commplane.api import refuse_overlap
from commplane.errors import UnsupportedOperation
from commplane.runtime.calls import Calls
from commplane.runtime.norm import fits, misfit, quantizes

if TYPE_CHECKING:
    import torch

    from commplane.api import Quantization, Quantized

__all__ = ["NormCalls"]


class NormCalls(Calls):
    """Part of `Communicator`."""

    def all_reduce_rms_norm(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum `tensor` over the ranks, add `residual`, normalise: what stands between two halves of a transformer layer.

        Args:
            tensor: this rank's partial sums, ``[..., hidden]``.
            residual: same shape and dtype, equal on all ranks.
            weight: ``[hidden]``, of the same dtype.
            eps: added to the mean square; equal on all ranks, as is the next.
            weight_bias: added to the weight; 1.0 is Gemma's.

        Returns:
            The norm and the new residual, both new tensors: the sum is rounded to the dtype, then the new residual; the norm
            is computed in float32 from the rounded residual and rounded once (float64 stays float64).

        Raises:
            UnsupportedOperation: the arguments do not fit each other, or nothing serves this dtype and size.
            MismatchError: the ranks called with different arguments.
            PeerError: a rank is missing at the deadline.
        """
        if not fits(tensor, residual, weight, eps, weight_bias):
            found = misfit(tensor, residual, weight, eps, weight_bias)
            raise UnsupportedOperation(f"{self.who} all_reduce_rms_norm {found}")
        call = self._table["all_reduce_rms_norm", None, tensor.dtype]
        try:
            return call(tensor, residual, weight, eps, weight_bias)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def all_reduce_rms_norm_(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`all_reduce_rms_norm` in place: `tensor` becomes the norm and `residual` the new residual; returns both.

        Nothing is allocated: above some hundred KiB that costs more than the operation, where the allocator gives memory back.
        """
        if not fits(tensor, residual, weight, eps, weight_bias):
            found = misfit(tensor, residual, weight, eps, weight_bias)
            raise UnsupportedOperation(f"{self.who} all_reduce_rms_norm_ {found}")
        if not (tensor.is_contiguous() and residual.is_contiguous()):
            refuse_overlap(tensor, self.who)
            refuse_overlap(residual, self.who)
        call = self._table["all_reduce_rms_norm_", None, tensor.dtype]
        try:
            call(tensor, residual, weight, eps, weight_bias)
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__
        return tensor, residual

    def all_reduce_rms_norm_quant(
        self,
        tensor: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        how: Quantization,
        eps: float = 1e-6,
        weight_bias: float = 0.0,
        *,
        keep_norm: bool = False,
    ) -> tuple[Quantized, torch.Tensor | None, torch.Tensor]:
        """`all_reduce_rms_norm` with the norm quantised for the matrix product that follows.

        Args:
            tensor: this rank's partial sums, ``[..., hidden]``.
            residual: same shape and dtype, equal on all ranks.
            weight: ``[hidden]``, of the same dtype.
            how: the format, and what it needs; equal on all ranks.
            eps: added to the mean square; equal on all ranks, as are the next two.
            weight_bias: added to the weight; 1.0 is Gemma's.
            keep_norm: whether the norm is wanted as well.

        Returns:
            The quantised norm, the norm or None, and the new residual, all new. The norm is rounded to its dtype, then quantised.

        Raises:
            UnsupportedOperation, MismatchError, PeerError: as `all_reduce_rms_norm`.
        """
        if not (fits(tensor, residual, weight, eps, weight_bias) and quantizes(tensor, how)):
            found = misfit(tensor, residual, weight, eps, weight_bias, how)
            raise UnsupportedOperation(f"{self.who} all_reduce_rms_norm_quant {found}")
        call = self._table["all_reduce_rms_norm_quant", how.format, tensor.dtype]
        try:
            return call(tensor, residual, weight, eps, weight_bias, how, keep_norm)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__
