"""A backend that keeps every clause, slowly: gathers over torch, then reduces in rank order. The wrong ones derive from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from commplane.api import Quantization, Quantized, ReduceOp, add_rms_norm, quantize, refuse_overlap
from commplane.backends.torch_dist import TorchDistributed
from commplane.errors import UnsupportedOperation

DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "int64")

# More elements than the canary uses, so that a mistake from here on is left for the kit to find.
LARGE = 200


class Honest(TorchDistributed):
    """Right in everything. The steps of an all-reduce are methods, for a wrong backend to replace one of them."""

    def open(self, context: Any) -> None:
        super().open(context)
        self.n, self.rank, self.ranks = context.world_size, context.rank, context.ranks
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def buffer(self, kind: str, count: int, dtype: torch.dtype) -> Tensor:
        """Memory that stays, grown when it has to."""
        found = self._buffers.get((kind, dtype))
        if found is None or found.numel() < count:
            found = self._buffers[kind, dtype] = torch.empty(count, dtype=dtype)
        return found[:count]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """What every rank contributes, in group order. Torch's gather would allocate."""
        slots = list(self.buffer("parts", self.n * flat.numel(), flat.dtype).view(self.n, -1))
        slots[self.rank].copy_(flat)
        for src, slot in enumerate(slots):
            self.broadcast(slot, src)
        return slots

    def order(self, count: int) -> Sequence[int]:
        """The ranks in the order of additions."""
        return range(self.n)

    def combine(self, parts: list[Tensor], op: ReduceOp, out: Tensor) -> None:
        """Reduce into `out`: halves in float32, rounded once."""
        narrow = out.is_floating_point() and out.dtype.itemsize == 2
        total = self.buffer("total", out.numel(), torch.float32) if narrow else out
        first, *rest = (parts[r] for r in self.order(out.numel()))
        total.copy_(first)
        for part in rest:
            if op in (ReduceOp.SUM, ReduceOp.AVG):
                total.add_(part)
            elif op is ReduceOp.MIN:
                torch.minimum(total, part.to(total.dtype), out=total)
            else:
                torch.maximum(total, part.to(total.dtype), out=total)
        if op is ReduceOp.AVG:
            total.div_(self.n)
        if narrow:
            out.copy_(total)

    def declared(self, tensor: Tensor) -> None:
        """Refuse what is not declared."""
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise UnsupportedOperation(f"{self._context.who} wanted {', '.join(DTYPES)}, found {tensor.dtype}")

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        self._check(tensor, op)
        self.declared(tensor)
        refuse_overlap(tensor, self._context.who)
        dense = tensor.detach().contiguous()
        flat = dense.view(-1)
        if flat.numel():
            self.combine(self.parts(flat), op, flat)
        return self.into(tensor, dense)

    def into(self, tensor: Tensor, dense: Tensor) -> Tensor:
        """Where the result goes."""
        if dense.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(dense)
        return tensor

    def all_reduce_rms_norm(
        self, tensor: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_bias: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(self.all_reduce(tensor, ReduceOp.SUM), residual, weight, eps, weight_bias)

    def all_reduce_rms_norm_quant(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        how: Quantization,
        keep_norm: bool,
    ) -> tuple[Quantized, Tensor | None, Tensor]:
        norm, total = self.all_reduce_rms_norm(tensor, residual, weight, eps, weight_bias)
        return self.quantized(norm, how), norm if keep_norm else None, total

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        """The norm in the format: a step for a wrong backend to replace."""
        return quantize(norm, how)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)
