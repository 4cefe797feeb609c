"""How a message of one shape goes: as which rows, by which algorithm, and whether a kernel takes such rows at all.

Pure: from shapes, settings and what all ranks agreed on, so every rank comes to the same. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commplane.errors import UnsupportedOperation, WorkspaceTooSmall
from commplane_flashinfer import checks
from commplane_flashinfer.patterns import plan_shape

if TYPE_CHECKING:
    import torch

__all__ = ["Plan", "Planner", "Plans"]

# Shapes remembered by one closure; a server has a few hundred, and of prompts of any length the oldest do not come again.
_MOST_PLANS = 4096


@dataclass(frozen=True)
class Plan:
    """What one shape needs.

    Attributes:
        tokens: as the kernels see it; 0 where there is nothing to launch.
        hidden: the same.
        one_shot: which algorithm.
        reshaped: whether a tensor has to be viewed as tokens x hidden, which costs as much as all else here.
        padded: whether it is larger than the message.
        fused: whether there is a launch for a row.
    """

    tokens: int
    hidden: int
    one_shot: bool
    reshaped: bool = True
    padded: bool = False
    fused: bool = True

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """A dense tensor as tokens x hidden."""
        return tensor.view(self.tokens, self.hidden) if self.reshaped else tensor


@dataclass(frozen=True)
class Planner:
    """Makes the plans of one workspace.

    Attributes:
        who: how errors begin.
        world_size: number of ranks.
        itemsize: bytes of an element.
        most: elements that the workspace holds.
        limit: the largest message in bytes that goes by one-shot where both may be.
    """

    who: str
    world_size: int
    itemsize: int
    most: int
    limit: int

    def sum(self, shape: torch.Size) -> Plan:
        """For a sum.

        Raises:
            WorkspaceTooSmall: a larger workspace would hold it.
            UnsupportedOperation: none would.
        """
        count = shape.numel()
        if not count:
            return Plan(0, 0, True)
        tokens, hidden, one_shot = plan_shape(count, self.itemsize, self.world_size, count * self.itemsize <= self.limit)
        self._check_room(tokens, hidden)
        return Plan(tokens, hidden, one_shot, shape != (tokens, hidden), padded=tokens * hidden != count)

    def norm(self, shape: torch.Size, group: int = 0) -> Plan:
        """For rows of ``shape[-1]``, quantised in groups of `group` elements if that is not 0. Raises as `sum`."""
        count, hidden = shape.numel(), shape[-1]
        if not count:
            return Plan(0, hidden, True)
        tokens = count // hidden
        self._check_room(tokens, hidden)
        if checks.launchable(hidden, self.itemsize, group) is not None:
            return Plan(tokens, hidden, True, fused=False)
        one_shot = count * self.itemsize <= self.limit
        one_shot = one_shot or checks.two_shot(tokens, hidden, self.itemsize, self.world_size) is not None
        return Plan(tokens, hidden, one_shot, len(shape) != 2)

    def _check_room(self, tokens: int, hidden: int) -> None:
        found = checks.capacity(tokens, hidden, self.itemsize, self.world_size, self.most)
        if found is not None:
            larger_helps, reason = found
            raise (WorkspaceTooSmall if larger_helps else UnsupportedOperation)(f"{self.who} {reason}")


class Plans(dict[Any, Plan]):
    """Shape -> plan, made at the first look."""

    def __init__(self, make: Callable[[torch.Size], Plan]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, shape: torch.Size) -> Plan:
        plan = self._make(shape)
        if len(self) >= _MOST_PLANS:
            self.clear()
        self[shape] = plan
        return plan
