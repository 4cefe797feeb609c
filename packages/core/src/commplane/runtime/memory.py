"""What a communicator builds beside its backends: workspaces, and tensors in symmetric memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from commplane.api import Capability, Collective, CommBackend, Requirement, Workspace
from commplane.errors import UnsupportedOperation
from commplane.notice import notice
from commplane.runtime.joint import JointSteps
from commplane.select import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["GroupMemory"]

Poison = Callable[[Exception], None]


class GroupMemory:
    """Workspaces and symmetric memory of one communicator, built on every rank of its group or on none.

    Args:
        who: how errors begin.
        plan: what runs in the group.
        backends: the open backends by name.
        device: where the group's tensors are.
        joint: the communicator's joint steps.
    """

    def __init__(self, who: str, plan: Plan, backends: Mapping[str, CommBackend], device: str, joint: JointSteps) -> None:
        self._who = who
        self._plan = plan
        self._backends = backends
        self._device = device
        self._joint = joint
        self._workspaces: list[Workspace] = []

    def follow(self, plan: Plan) -> None:
        """Prepare for the routes of `plan` from now on. Local."""
        self._plan = plan

    def _with_parts(self, need: Requirement) -> list[Requirement]:
        """`need`, and of what it is composed of at some size: a part then needs what it needs by itself. Local."""
        largest: dict[Collective, int] = {}
        for capturing in (False, True):
            for op in need.collective.variants if need.collective.norms else ():
                for r in self._plan.composed(need.collective, op, need.dtype, capturing=capturing):
                    if r.low <= need.max_bytes:
                        high = need.max_bytes if r.high is None else min(need.max_bytes, r.high - 1)
                        largest[r.collective] = max(high, largest.get(r.collective, 0))
        return [need, *(replace(need, collective=part, max_bytes=most) for part, most in largest.items())]

    def prepare(
        self,
        collective: str,
        dtype: torch.dtype | str,
        max_bytes: int,
        build: Callable[[Sequence[Requirement]], list[Workspace]],
        poison: Poison,
    ) -> None:
        """`Communicator.prepare`; `build` makes the workspaces of this rank. Collective."""
        if collective not in Collective._value2member_map_:
            raise UnsupportedOperation(f"{self._who} prepare wants one of {', '.join(Collective)}, found {collective!r}")
        need = Requirement(Collective(collective), str(dtype).removeprefix("torch."), int(max_bytes))
        if need.max_bytes < 0:
            raise UnsupportedOperation(f"{self._who} prepare wants max_bytes of 0 or more, found {max_bytes}")

        needs = self._with_parts(need)

        def undo(built: Iterable[Workspace]) -> None:
            for workspace in built:
                _close(workspace)

        value = {"collective": str(need.collective), "dtype": need.dtype, "max_bytes": need.max_bytes}
        built = self._joint.run("prepare", value, lambda: build(needs), undo, poison)
        for workspace in built:
            workspace.commit()
        self._workspaces.extend(built)

    def empty(self, shape: tuple[Any, ...], dtype: torch.dtype | None, poison: Poison) -> torch.Tensor:
        """`Communicator.empty`. Collective."""
        import torch

        kind = torch.get_default_dtype() if dtype is None else dtype
        name = str(kind).removeprefix("torch.")
        given = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        try:
            sizes = tuple(operator.index(n) for n in given)
        except TypeError:
            raise UnsupportedOperation(f"{self._who} empty wants integers, found {given}") from None
        if any(n < 0 for n in sizes):
            raise UnsupportedOperation(f"{self._who} empty wants sizes of 0 or more, found {list(sizes)}")
        backend = next(
            (
                self._backends[s.name]
                for s in self._plan.specs
                if Capability.SYMMETRIC_MEMORY in s.capabilities and (not s.dtypes or name in s.dtypes)
            ),
            None,
        )

        def allocate() -> torch.Tensor:
            if backend is None:
                return torch.empty(sizes, dtype=kind, device=self._device)
            return backend.empty(sizes, kind)

        return self._joint.run("empty", {"shape": list(sizes), "dtype": name}, allocate, lambda _tensor: None, poison)

    def close(self) -> None:
        """Close the workspaces; what one raises is a notice, because the rest has to go all the same. Local."""
        for workspace in self._workspaces:
            _close(workspace)


def _close(workspace: Workspace) -> None:
    try:
        workspace.close()
    except Exception as error:  # a vote has been taken, or the caller is leaving
        notice(f"close of a workspace of backend {workspace.backend!r} raised {error!r}")
