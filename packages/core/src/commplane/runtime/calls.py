"""The collectives of a communicator: one lookup in its table, one call, and what an error of the call means for the group."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from commplane.errors import UnsupportedOperation, WorkspaceTooSmall
from commplane.tracer import without_data

if TYPE_CHECKING:
    import torch

__all__ = ["Calls"]


class Calls:
    """Part of `Communicator`, which has what is only declared here."""

    world_size: int
    _table: dict[Any, Callable[..., Any]]

    if TYPE_CHECKING:

        @property
        def who(self) -> str:
            """How errors begin."""
            ...

        def poison(self, error: Exception) -> None:
            """Make every later call raise."""
            ...

    def all_reduce_(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Reduce in place over the ranks with sum, min, max or avg; returns `tensor`.

        Raises:
            UnsupportedOperation: no backend of the plan serves this dtype, op or size.
            MismatchError: the ranks called with different arguments.
            PeerError: a rank is missing at the deadline.
        """
        call = self._table["all_reduce_", op, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """`all_reduce_` into a new tensor; the input is left as it was."""
        call = self._table["all_reduce", op, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors concatenated along dimension 0 in group order; shapes are equal on all ranks."""
        self._at_least_one_dimension("all_gather", tensor)
        call = self._table["all_gather", None, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def reduce_scatter(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """Part `rank` of the reduced tensor, cut evenly along dimension 0, which the world size must divide."""
        self._at_least_one_dimension("reduce_scatter", tensor)
        if tensor.shape[0] % self.world_size:
            raise UnsupportedOperation(
                f"{self.who} reduce_scatter wants a first dimension that {self.world_size} ranks divide, "
                f"found shape {list(tensor.shape)}: pad it"
            )
        call = self._table["reduce_scatter", op, tensor.dtype]
        try:
            return call(tensor)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Fill `tensor` in place from group rank `src`; returns `tensor`."""
        if not 0 <= src < self.world_size:
            raise UnsupportedOperation(f"{self.who} broadcast wants src as a group rank below {self.world_size}, found {src}")
        call = self._table["broadcast", None, tensor.dtype]
        try:
            return call(tensor, src)  # type: ignore[no-any-return]
        except Exception as error:
            raise self._failed(error, tensor) from error.__cause__

    def barrier(self) -> None:
        """Return when every rank has come here."""
        call = self._table["barrier", None, None]
        try:
            call()
        except Exception as error:
            raise self._failed(error) from error.__cause__

    def _at_least_one_dimension(self, what: str, tensor: torch.Tensor) -> None:
        if tensor.dim() == 0:
            raise UnsupportedOperation(f"{self.who} {what} wants a tensor with a first dimension, found a scalar")

    def _failed(self, error: Exception, tensor: torch.Tensor | None = None) -> Exception:
        """What to raise for `error` of a collective: poisons, unless nothing was sent.

        That is so of both errors that let it go on: a backend raises them before it sends, from what is equal on all ranks.
        """
        if tensor is not None and str(tensor.layout) != "torch.strided":
            return UnsupportedOperation(f"{self.who} wanted a dense tensor, found layout {tensor.layout}: use to_dense()")
        if tensor is not None and without_data(tensor):
            return UnsupportedOperation(
                f"{self.who} wanted a tensor, found the {type(tensor).__name__} of a trace: use commplane.ops"
            )
        if not isinstance(error, UnsupportedOperation | WorkspaceTooSmall):
            self.poison(error)
        return error
