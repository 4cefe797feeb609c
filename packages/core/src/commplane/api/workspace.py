"""Workspaces: memory that a communicator owns and that exists before it is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from commplane.api.types import Collective

__all__ = ["Requirement", "Workspace"]


@dataclass(frozen=True)
class Requirement:
    """What `Communicator.prepare` was asked for; equal on every rank of the group.

    Attributes:
        collective: the operation.
        dtype: torch's name of the dtype without ``torch.``, such as ``"bfloat16"``.
        max_bytes: size in bytes of the largest input of one rank.
    """

    collective: Collective
    dtype: str
    max_bytes: int


class Workspace(ABC):
    """One piece of memory, owned by the communicator it was built for and closed with it.

    Attributes:
        backend: name of the backend it serves.
        nbytes: size in bytes on this rank.
    """

    backend: str
    nbytes: int

    def commit(self) -> None:
        """Every rank has built its part: begin to use it. Local, must not fail; optional."""

    @abstractmethod
    def close(self) -> None:
        """Release it; before `commit`, leave everything as it was before it was built. Local, idempotent."""
