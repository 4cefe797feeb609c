"""Backends that work, and fail where the scenario says. What they wait for, they wait for by the simulation's clock."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from agreement_scenario import BACKENDS, Fault

from commplane.api import (
    BackendSpec,
    BuildContext,
    Capability,
    CommBackend,
    Facts,
    ProbeRequest,
    ReduceOp,
    Requirement,
    Unusable,
    Usable,
    Verdict,
    Workspace,
    hookimpl,
)
from commplane.errors import PeerError
from commplane.plugins import PluginHost
from commplane.testing import Simulation

if TYPE_CHECKING:
    from agreement_ranks import Case

CASES: list[Case] = []
"""The case that runs; specs name module-level functions, which find it here."""

LOCAL = 2
"""An all-reduce of so many elements sends nothing, like a kernel that a capture only records."""


def case() -> Case:
    return CASES[-1]


class Exchange(Protocol):
    """How the ranks of one backend get at each other's numbers."""

    def meet(self, backend: Scripted, call: int, mine: torch.Tensor) -> list[torch.Tensor]:
        """What every rank brought to that call, in group order; `PeerError` for all of those who come if one does not."""

    def leave(self, backend: Scripted) -> None:
        """This rank comes to no later call: who waits for it need not."""


@dataclass(eq=False)
class Meeting:
    """One all-reduce: who has come with what, and who will not."""

    signal: Any
    parts: dict[int, torch.Tensor] = field(default_factory=dict)
    quitters: set[int] = field(default_factory=set)


class InMemory:
    """An `Exchange` between the ranks of one simulation."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._meetings: dict[tuple[str, int], Meeting] = {}
        self._left: dict[str, set[int]] = {}

    def meet(self, backend: Scripted, call: int, mine: torch.Tensor) -> list[torch.Tensor]:
        context = backend.context
        assert context is not None
        meeting = self._meetings.get((backend.token, call))
        if meeting is None:
            meeting = self._meetings[backend.token, call] = Meeting(self._simulation.clock.signal())
            meeting.quitters |= self._left.get(backend.token, set())
        if not meeting.quitters:
            meeting.parts[backend.rank] = mine
        if len(meeting.parts) == context.world_size:
            meeting.signal.set()
        elif not meeting.quitters and not meeting.signal.wait(context.timeout) and len(meeting.parts) < context.world_size:
            meeting.quitters |= set(context.ranks) - meeting.parts.keys()  # who comes now is too late
            meeting.signal.set()
        if len(meeting.parts) < context.world_size:
            raise not_come(context, meeting.quitters - {backend.rank})
        return [meeting.parts[r] for r in context.ranks]

    def leave(self, backend: Scripted) -> None:
        if backend.rank in self._simulation.dead:
            return
        self._left.setdefault(backend.token, set()).add(backend.rank)
        for (token, _), meeting in self._meetings.items():
            if token == backend.token and backend.rank not in meeting.parts:
                meeting.quitters.add(backend.rank)
                meeting.signal.set()


def not_come(context: BuildContext, ranks: Iterable[int]) -> PeerError:
    missing = sorted(ranks)
    return PeerError(f"{context.who} all_reduce: rank {', '.join(map(str, missing))} did not come", missing)


class Scripted(CommBackend):
    """All-reduce in the memory of this process."""

    keeps_flight_records = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.rank = case().simulation.rank
        self.case = case()
        self.closes = 0
        self.calls = 0
        self.group = 0
        self.token = ""
        self.context: BuildContext | None = None

    def strike(self, phase: str) -> Fault | None:
        return self.case.strike(phase, self.rank, self.group, self.name)

    def open(self, context: BuildContext) -> None:
        self.context = context
        self.group = int(context.key.purpose[1:])
        self.strike("open")
        self.token = context.bootstrap.broadcast(f"{self.name}{os.getpid()}-{id(self)}", src=0, what="rendezvous")
        self.strike("rendezvous")
        context.bootstrap.barrier(what="all have met")

    def close(self) -> None:
        self.closes += 1

    def abort(self) -> None:
        if self.token:
            self.case.exchange.leave(self)

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        if tensor.numel() <= LOCAL:
            return tensor
        fault = self.strike("canary") if self.calls == 0 else None
        self.calls += 1
        rows = self.case.exchange.meet(self, self.calls, tensor.clone())
        return tensor.copy_(rows[0] if fault is not None and fault.how == "wrong" else torch.stack(rows).sum(0))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.strike("empty")
        return torch.empty(*shape, dtype=dtype)

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        self.strike("prepare")
        out = [ScriptedWorkspace(self.name, need.max_bytes) for need in requirements]
        self.case.workspaces.extend((self.rank, workspace) for workspace in out)
        return list(out)

    def capture_end(self, bootstrap: Any) -> None:
        self.strike("registration")
        bootstrap.barrier(what=f"registration of {self.name}")


class ScriptedWorkspace(Workspace):
    def __init__(self, backend: str, nbytes: int) -> None:
        self.backend = backend
        self.nbytes = nbytes
        self.commits = 0
        self.closes = 0

    def commit(self) -> None:
        self.commits += 1

    def close(self) -> None:
        self.closes += 1


def make(name: str) -> CommBackend:
    current = case()
    rank = current.simulation.rank
    # Where the group is not known yet, a fault of any group is meant.
    current.strike("construct", rank, None, name)
    out = Scripted(name)
    current.built.append((rank, out))
    return out


def probe(name: str, request: ProbeRequest, facts: Facts) -> Verdict:
    fault = case().strike("probe", request.ranks[request.rank], int(request.key.purpose[1:]), name)
    if fault is not None and fault.how == "refuse":
        return Unusable(case().text_of(fault))
    if fault is not None and fault.how == "facts":
        return Usable({"found": case().text_of(fault)})
    return Usable({"found": "nothing special"})


make_a, make_b, make_c = (partial(make, name) for name in BACKENDS)
probe_a, probe_b, probe_c = (partial(probe, name) for name in BACKENDS)


class Scripts:
    """The plugin of one rank. `absent` are backends that it does not have, `odd` those whose spec is another."""

    def __init__(self, count: int, absent: frozenset[str], odd: frozenset[str]) -> None:
        self.names = [name for name in BACKENDS[:count] if name not in absent]
        self.odd = odd

    @hookimpl
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        return [
            BackendSpec(
                name=name,
                api=(1, 0),
                factory=f"agreement_backend:make_{name}",
                probe=f"agreement_backend:probe_{name}",
                capabilities={Capability.ALL_REDUCE, Capability.SYMMETRIC_MEMORY, Capability.CAPTURE},
                dtypes={"float32"},
                device="cpu",
                min_world_size=1,
                priority=10 + BACKENDS.index(name) + (100 if name in self.odd else 0),
            )
            for name in self.names
        ]

    @hookimpl
    def commplane_select_backend(self, request: ProbeRequest, candidates: Sequence[str]) -> Sequence[str] | None:
        fault = case().strike("select", request.ranks[request.rank], int(request.key.purpose[1:]), None)
        return list(reversed(candidates))[:1] if fault is not None and fault.how == "differs" else None


class ScriptedHost(PluginHost):
    """Without torch's backends, whose transports wait by no clock but the real one."""

    def backends(self, device: str | None = None) -> Any:
        return {name: entry for name, entry in super().backends(device).items() if entry.plugin != "torch"}


_HOSTS: dict[tuple[int, int, frozenset[str], frozenset[str]], ScriptedHost] = {}


def host(rank: int, count: int, absent: frozenset[str], odd: frozenset[str], version: str) -> ScriptedHost:
    """The plugins of a rank; kept from case to case, because making them takes longer than most cases."""
    key = (rank, count, absent, odd)
    if key not in _HOSTS:
        _HOSTS[key] = ScriptedHost()
        _HOSTS[key].register(Scripts(count, absent, odd), "scripts", dist="scripts-wheel")
    _HOSTS[key].versions["scripts"] = ("scripts-wheel", version)
    return _HOSTS[key]
