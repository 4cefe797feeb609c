"""Communicators inside of a backend: formed like those of the plane, but known to nobody else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from commplane.agree import StoreBootstrap, abort_backend, close_backend
from commplane.api import Collective, CommBackend, Facts, GroupKey, ReduceOp, Requirement, Workspace
from commplane.errors import ConfigError
from commplane.runtime.dispatch import IN_PLACE, DispatchTable
from commplane.runtime.inquest import Inquest
from commplane.select import Plan

if TYPE_CHECKING:
    import torch

__all__ = ["Formed", "Inner", "InnerMaker"]

Formed = tuple[Plan, dict[str, CommBackend], list[StoreBootstrap]]


class Inner:
    """`commplane.api.InnerGroup`: a plan, its open backends and a dispatch table.

    Args:
        key: identity of the inner group.
        rank: rank of this process in it.
        device: of this process for it.
        formed: what the ranks agreed on and built.
    """

    def __init__(self, key: GroupKey, rank: int, device: str, formed: Formed) -> None:
        self.rank = rank
        self.ranks = key.ranks
        self._who = f"[{key.purpose} rank {rank}/{len(key.ranks)}]"
        self._device = device
        self._plan, self._named, _ = formed

    @property
    def backends(self) -> tuple[str, ...]:
        """Names, in the order of the plan."""
        return self._plan.backends

    def bind(
        self, collective: Collective, op: ReduceOp | None, dtype: torch.dtype | None, *, in_place: bool
    ) -> Callable[..., Any]:
        """From a table of its own, so that what backends built since the last call is found."""
        names = {held: name for name, held in IN_PLACE.items()}
        name = names[collective] if in_place and collective in names else collective.value
        return DispatchTable(self._who, self._plan, self._named)[name, None if op is None else op.value, dtype]

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        """Of each backend; if one raises, what the ones before it built is closed."""
        built: list[Workspace] = []
        try:
            for backend in self._named.values():
                built.extend(backend.init_workspace(requirements))
        except BaseException:
            for workspace in built:
                workspace.close()
            raise
        return built

    def abort(self) -> None:
        """Each backend's."""
        for name, backend in self._named.items():
            abort_backend(name, [backend])

    def close(self) -> None:
        """Each backend's, in the order of the plan."""
        for name, backend in self._named.items():
            close_backend(name, backend, self._device)


class InnerMaker:
    """`commplane.api.InnerGroups` of one backend in one group.

    Args:
        key: of the outer group.
        device: of this process.
        rank: global rank of this process.
        attempt: control plane of the backend.
        facts: of all ranks.
        form: forms a group: its key, its control plane, names of backends.
    """

    def __init__(
        self,
        key: GroupKey,
        device: str,
        rank: int,
        attempt: StoreBootstrap,
        facts: Facts,
        form: Callable[[GroupKey, StoreBootstrap, Sequence[str]], Formed],
    ) -> None:
        self._key = key
        self._device = device
        self._rank = rank
        self._attempt = attempt
        self._form = form
        self._names: set[str] = set()
        self._inquest = Inquest(attempt, key.ranks, rank, facts)

    def form(self, name: str, ranks: Sequence[int], *, backends: Sequence[str] = ()) -> Inner:
        """Collective over `ranks`. The key is the outer one's with ``.name`` behind the purpose."""
        inner = GroupKey(tuple(ranks), self._key.device, f"{self._key.purpose}.{name}")
        if name in self._names or self._rank not in inner.ranks or not set(inner.ranks) <= set(self._key.ranks):
            raise ConfigError(
                f"inner group {name!r}: wanted a name that is new, and ranks of {list(self._key.ranks)} with {self._rank} among "
                f"them, found {list(ranks)}"
            )
        self._names.add(name)
        rank = inner.ranks.index(self._rank)
        who = f"[{inner.purpose} rank {rank}/{len(inner.ranks)}]"
        bootstrap = self._attempt.part(f"inner/{inner.digest}", inner.ranks, who=who)
        formed = self._form(inner, bootstrap, backends)
        for attempt in formed[2]:
            self._attempt.lead(attempt)
        return Inner(inner, rank, self._device, formed)

    def find_missing(self, suspects: Sequence[Sequence[int]], patience: float) -> tuple[int, ...] | None:
        """Over the store, without a round: it may be asked inside a capture, where only what was recorded counts."""
        return self._inquest.find(suspects, patience)
