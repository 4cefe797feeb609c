"""A backend without a transport, to measure what lies between a user's call and a backend on its own.

Over one rank an all-reduce is the identity, so a backend that returns its argument is right there, and the canary of a group of
one rank passes it. For `commplane bench --overhead` alone: no wheel registers it, and it serves no other group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from commplane.api import (
    BackendSpec,
    BuildContext,
    Capability,
    Collective,
    CommBackend,
    Facts,
    Numerics,
    ProbeRequest,
    ReduceOp,
    Usable,
    Verdict,
    hookimpl,
)

if TYPE_CHECKING:
    import torch

__all__ = ["NAME", "NullBackend", "NullPlugin", "probe"]

NAME = "null"


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """Always usable: the spec admits only groups of one rank."""
    return Usable()


class NullPlugin:
    """Registers `NullBackend`; given to the plugin host by the measurement itself."""

    @hookimpl
    def commplane_register_comm_backends(self) -> Sequence[BackendSpec]:
        """One backend, for one rank."""
        return [
            BackendSpec(
                name=NAME,
                api=(1, 0),
                factory="commplane.bench.null:NullBackend",
                probe="commplane.bench.null:probe",
                capabilities={Capability.ALL_REDUCE},
                dtypes=(),
                ops=("sum", "min", "max", "avg"),
                device="any",
                min_world_size=1,
                max_world_size=1,
                numerics=Numerics.RANK_ORDER,  # of one rank
            )
        ]


class NullBackend(CommBackend):
    """Does nothing, at once. Its calls are as lean as a backend's bound callable can be in Python."""

    def open(self, context: BuildContext) -> None:
        """Nothing to build."""

    def close(self) -> None:
        """Nothing to release."""

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        """The sum over one rank is the tensor itself."""
        return tensor

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        """A function that returns its argument, or a copy of it."""
        return _same if in_place else _copy

    def bare(self, tensor: torch.Tensor, op: ReduceOp) -> Callable[[], object]:
        """The function itself: what a call of Python costs that does nothing."""
        return partial(_same, tensor)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()
