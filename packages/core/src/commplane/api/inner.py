"""What a backend that is made of other backends is given: communicators of parts of its group, agreed like any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from commplane.api.types import Collective, ReduceOp
from commplane.api.workspace import Requirement, Workspace

__all__ = ["InnerGroup", "InnerGroups"]


class InnerGroup(Protocol):
    """Some ranks of a backend's group, with a plan of their own. The backend owns it, and closes it with itself."""

    @property
    def rank(self) -> int:
        """Rank of this process in the inner group."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks in the order of the inner group."""

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of what its plan holds, in order; equal on its ranks."""

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: Any, *, in_place: bool) -> Callable[..., Any]:
        """The callable for one (collective, op, torch dtype), as `CommBackend.bind` gives it. Local.

        Which backend runs goes by size. Bound anew after each `init_workspace`.
        """

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Build what its backends need; for `init_workspace` of the backend that owns it. Collective over its ranks."""

    def abort(self) -> None:
        """Make ranks that wait for this one in the inner group stop waiting. Local."""

    def close(self) -> None:
        """Release everything. Idempotent, local: ranks that still wait for this one find it gone."""


class InnerGroups(Protocol):
    """Makes inner groups for one backend, and finds out for it who is missing."""

    def form(self, name: str, ranks: Sequence[int], *, backends: Sequence[str] = ()) -> InnerGroup:
        """Agree, build, prove and commit, as for any communicator. Collective over `ranks`, within `CommBackend.open`.

        The order of additions is the owner's to declare: the setting ``numerics`` does not bear on inner groups.

        Args:
            name: of the inner group, unique in the backend; groups of one name have no rank in common.
            ranks: global ranks in the order of the inner group, this one among them.
            backends: names in the order of preference; empty for the order of priority.

        Raises:
            CommplaneError: as `Plane.communicator` raises.
        """

    def find_missing(self, suspects: Sequence[Sequence[int]], patience: float) -> tuple[int, ...] | None:
        """Who is gone, after a collective failed: the same answer on each rank of the group that asks. Once for a backend.

        Each rank that failed says whom it suspects. A suspected set of ranks is cleared when one of them asks too; who is named
        are the ranks of the other sets, and of these only those whose process is known to have ended, where there are any.

        Args:
            suspects: sets of global ranks, one of each of which did not do its part as far as this rank can tell.
            patience: seconds that a suspect has to ask as well. Processes that are known to have ended are not waited for.

        Returns:
            Global ranks, none where every suspect answered; None where the control plane itself does not answer.
        """
