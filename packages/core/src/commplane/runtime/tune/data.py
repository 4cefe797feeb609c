"""What is sent while a way to run a call is verified and timed, and what has to come of it.

Values are small integers, so that every order of adding them is exact. They follow from the index and the rank, so that what the
other ranks sent need not be held: results are compared piece by piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from commplane.api import Collective, ReduceOp, add_rms_norm, misquantized, quantize
from commplane.runtime.dispatch import DispatchTable
from commplane.runtime.tune.subject import Subject, quantization

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NORM_PLACES", "Data", "Wrong"]

NORM_PLACES = {2: 2.5, 4: 16.0, 8: 16.0}
"""How far a norm may be from torch's, in units of the last place, by bytes of the dtype: kernels take roots and reciprocals
approximately, which costs float32 some of its 24 bits and hardly shows in a narrow dtype."""

_MEAN_PLACES = 8.0
"""The same of a mean."""

_EPS, _WEIGHT_BIAS = 1e-6, 0.0
_PIECE = 1 << 20
"""Elements that are compared at a time: temporaries are some 8 bytes each."""
_PERIOD = 1021
"""Of the values along the tensor; a prime, so that a piece that lands a power of two away does not fit there."""


class Wrong(Exception):
    """A call came back on this rank with what it must not give."""


class Data:
    """Tensors of one size for one rank. Local.

    Args:
        subject: what is tuned.
        nbytes: size of the tensor; `nbytes` has what it really is.
        device: where.
        rank: group rank.
        world_size: ranks of the group.
    """

    def __init__(self, subject: Subject, nbytes: int, device: str, rank: int, world_size: int) -> None:
        import torch

        self._subject = subject
        self._dtype = getattr(torch, subject.dtype)
        self._device = device
        self._rank = rank
        self._world_size = world_size
        count = max(1, nbytes // self._dtype.itemsize)
        self._shape = [max(1, count // subject.hidden), subject.hidden] if subject.collective.norms else [count]
        self.tensor = torch.empty(self._shape, dtype=self._dtype, device=device)
        self.nbytes = self.tensor.nbytes
        self._residual = torch.empty_like(self.tensor) if subject.collective.norms else self.tensor
        self._weight = ((torch.arange(self._shape[-1], device=device) % 3) + 1).to(self._dtype)
        self._how = quantization(subject.variant, device)
        for rows, numbers in self._pieces():
            self.tensor[rows] = self._values(numbers, rank).to(self._dtype)
            if subject.collective.norms:
                self._residual[rows] = ((numbers * 3) % 5 - 2).to(self._dtype)

    def call(self, table: DispatchTable, *, timed: bool = False) -> Callable[[], Any]:
        """The call without arguments; of a quantised norm the norm comes with it unless it is `timed`."""
        s = self._subject
        bound = table[str(s.collective), s.variant and str(s.variant), self._dtype]
        arguments: tuple[Any, ...] = (self.tensor,)
        if s.collective.norms:
            arguments = (self.tensor, self._residual, self._weight, _EPS, _WEIGHT_BIAS)
        if self._how is not None:
            arguments = (*arguments, self._how, not timed)
        return lambda: bound(*arguments)

    def check(self, got: Any) -> None:
        """Compare what `call` gave. Local; holds pieces beside it, of a quantised norm another one.

        Raises:
            Wrong: it is something else, or nothing that can be compared.
            MemoryError, torch.OutOfMemoryError: there is no memory for the comparison.
        """
        try:
            self._compare(got)
        except Wrong:
            raise
        except Exception as error:  # what a plugin gives may be anything
            if _is_of_memory(error):
                raise
            raise Wrong(f"gave what cannot be compared: {type(error).__name__}: {error}") from error

    def _compare(self, got: Any) -> None:
        import torch

        s = self._subject
        norms = s.collective.norms
        parts = [*got] if norms and isinstance(got, tuple) else [got]
        tensors = parts if self._how is None else parts[1:]
        if len(tensors) != 1 + norms or not all(isinstance(t, torch.Tensor) for t in tensors):
            raise Wrong(f"gave {[type(part).__name__ for part in parts]}, which is no result of this call")
        for tensor in tensors:
            if list(tensor.shape) != self._shape or tensor.dtype is not self._dtype:
                raise Wrong(f"gave {tensor.dtype}{list(tensor.shape)}, wanted {self._dtype}{self._shape}")
            if tensor.device != self.tensor.device:
                raise Wrong(f"gave a tensor on {tensor.device}, wanted {self.tensor.device}")
        total, norm = tensors[-1], tensors[0] if norms else None
        wrong = changed = 0
        for rows, numbers in self._pieces():
            changed += int((self.tensor[rows] != self._values(numbers, self._rank).to(self._dtype)).sum())
            wanted = self._reduced(numbers).to(self._dtype)
            if norm is not None:
                wanted_norm, wanted = add_rms_norm(wanted, self._residual[rows], self._weight, _EPS, _WEIGHT_BIAS)
                rtol = NORM_PLACES[self._dtype.itemsize] * torch.finfo(self._dtype).eps
                if not torch.allclose(norm[rows].double(), wanted_norm.double(), rtol=rtol, atol=1e-6):
                    raise Wrong(f"gave a wrong norm of {self.nbytes} bytes of {s.dtype}")
            wrong += int((~self._equal(total[rows], wanted)).sum())
        if wrong:
            what = "the residual" if norms else "the result"
            raise Wrong(f"gave {what} wrong at {wrong} of {self.tensor.numel()} elements")
        if changed:
            raise Wrong(f"changed its input at {changed} of {self.tensor.numel()} elements")
        if self._how is not None:
            problem = misquantized(got[0], quantize(got[1], self._how))
            if problem:
                raise Wrong(f"quantised wrongly: {problem}")

    def _equal(self, got: Tensor, wanted: Tensor) -> Tensor:
        """Where two pieces are. Only a mean may need rounding, which a backend may do before it divides or after."""
        import torch

        if self._subject.variant is not ReduceOp.AVG:
            return got == wanted
        return torch.isclose(got.double(), wanted.double(), rtol=_MEAN_PLACES * torch.finfo(self._dtype).eps, atol=0.0)

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Some elements, or whole rows, at a time: where they are, and their numbers in the shape that they have there."""
        import torch

        row = self._shape[-1] if len(self._shape) > 1 else 1
        step = max(1, _PIECE // row)
        for first in range(0, self._shape[0], step):
            rows = slice(first, min(first + step, self._shape[0]))
            numbers = torch.arange(rows.start * row, rows.stop * row, device=self._device)
            yield rows, numbers.reshape(-1, *self._shape[1:])

    def _values(self, numbers: Tensor, rank: int) -> Tensor:
        """What a rank sends, as integers from -1 to 3; from 0 on where the dtype has no sign."""
        signed = 0 if str(self._dtype) == "torch.uint8" else 1
        return (numbers % _PERIOD * 7 + rank * (1 + numbers % 3)) % 5 - signed

    def _reduced(self, numbers: Tensor) -> Tensor:
        """What all ranks' values come to."""
        import torch

        op = self._subject.variant if self._subject.collective is Collective.ALL_REDUCE else ReduceOp.SUM
        total = self._values(numbers, 0)
        for rank in range(1, self._world_size):
            values = self._values(numbers, rank)
            if op is ReduceOp.MIN:
                total = torch.minimum(total, values)
            elif op is ReduceOp.MAX:
                total = torch.maximum(total, values)
            else:
                total += values
        return total.double() / self._world_size if op is ReduceOp.AVG else total


def _is_of_memory(error: Exception) -> bool:
    """Whether memory has ended; torch has no class for that on the CPU."""
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
