"""One case: what every virtual rank does, and what it saw. Nothing is judged here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from agreement_backend import CASES, LOCAL, Exchange, InMemory, Scripted, ScriptedWorkspace, host
from agreement_scenario import BACKENDS, STARTUP_S, Fault, Scenario

from commplane import errors
from commplane.agree import StoreBootstrap
from commplane.runtime import Communicator, Plane
from commplane.testing import Killed, SimulatedStore, Simulation, init_simulated

RUN_S = STARTUP_S / 2

UNHURT = (errors.MismatchError, errors.SelectionError, errors.PluginNotFound, errors.CommplaneWarning)
"""After these a rank goes on; so it does after a `CommunicatorError` of a step that was rolled back."""


@dataclass
class Record:
    """One call of a user on one rank.

    Attributes:
        step: which; the same text on every rank that makes the call with it.
        members: global ranks that belong to it.
        began, ended: virtual seconds; a call that did not end because the rank died has no end.
        error: what it raised.
        value: what it returned.
        rounds: rounds of the control plane that the rank came to in it.
        body: for a capture, what the body of the block raised.
    """

    step: str
    members: tuple[int, ...]
    began: float
    ended: float | None = None
    error: BaseException | None = None
    value: Any = None
    rounds: int = 0
    body: BaseException | None = None


@dataclass
class Wait:
    """One round of the control plane on one rank."""

    rank: int
    who: str
    what: str
    members: tuple[int, ...]
    began: float
    ended: float


@dataclass
class Case:
    """A scenario while it runs, and what is left of it.

    Attributes:
        logs: rank -> its calls, in order.
        waits: every round.
        built: rank and object of every backend that was constructed.
        workspaces: rank and object of every workspace.
        fired: the faults that took place, and the call of that rank in which they did.
        stuck: threads that would have waited for ever.
        exchange: how the backends reach each other.
        start: `commplane.init` for one rank.
        real: on real processes, where time depends on what else the machine does.
        died: rank -> when.
        cut_off: ranks that have waited in vain for the store, or were told that it is gone.
    """

    scenario: Scenario
    simulation: Simulation
    store: SimulatedStore
    exchange: Exchange
    start: Callable[..., Plane]
    logs: dict[int, list[Record]] = field(default_factory=dict)
    real: bool = False
    waits: list[Wait] = field(default_factory=list)
    built: list[tuple[int, Scripted]] = field(default_factory=list)
    workspaces: list[tuple[int, ScriptedWorkspace]] = field(default_factory=list)
    fired: dict[Fault, str] = field(default_factory=dict)
    stuck: list[str] = field(default_factory=list)
    cut_off: set[int] = field(default_factory=set)
    interrupted: set[int] = field(default_factory=set)
    died: dict[int, float] = field(default_factory=dict)

    def text_of(self, fault: Fault) -> str:
        """What the rank says where it fails."""
        return f"as rank {fault.rank} was told for {fault.phase}"

    def strike(self, phase: str, rank: int, group: int | None, backend: str | None) -> Fault | None:
        """What is to go wrong here, once. Raises and waits by itself; the rest is the caller's."""
        for fault in self.scenario.faults:
            if (
                (fault.phase, fault.rank) != (phase, rank)
                or (group is not None and fault.group != group)
                or (backend is not None and BACKENDS[fault.backend] != backend)
                or fault in self.fired
            ):
                continue
            self.fired[fault] = self.logs[rank][-1].step if self.logs[rank] else "init"
            if fault.how == "late":
                self.simulation.sleep(fault.seconds)
            elif fault.how == "raise":
                raise RuntimeError(self.text_of(fault))
            return fault
        return None

    def note_anywhere(self, rank: int) -> None:
        """Begin what begins at a point of `rank`; the simulation sees to the deaths and interrupts itself."""
        for fault in self.scenario.faults:
            if fault.phase == "anywhere" and fault.rank == rank and fault.point == self.simulation.points[rank]:
                if fault.how == "die":
                    self._fire(fault)
                    self.died[rank] = self.simulation.time
                    self.simulation.kill_at[rank] = fault.point
                elif fault.how == "lost":
                    self._fire(fault)
                    self.store.gone = True
                    self.cut_off.update(range(self.scenario.ranks))
                elif fault.how == "silence":
                    self._fire(fault)
                    for other in range(self.scenario.ranks) if fault.everywhere else [rank]:
                        self.simulation.silent[other] = self.simulation.time + fault.seconds
                        if fault.seconds >= STARTUP_S:
                            self.cut_off.add(other)

    def _fire(self, fault: Fault) -> None:
        log = self.logs[fault.rank]
        self.fired[fault] = log[-1].step if log else "init"

    @contextmanager
    def step(self, rank: int, name: str, members: Sequence[int]) -> Iterator[Record]:
        """Write down one call."""
        record = Record(name, tuple(members), self.simulation.time)
        self.logs[rank].append(record)
        rounds = self.store.rounds[rank]
        try:
            yield record
        except Killed:
            raise
        except BaseException as error:
            record.error = error
            raise
        finally:
            if rank not in self.simulation.dead:
                record.ended = self.simulation.time
                record.rounds = self.store.rounds[rank] - rounds


def play(scenario: Scenario) -> Case:
    """Run a scenario."""
    simulation = Simulation(scenario.seed, scenario.restless)
    store, logs = SimulatedStore(simulation), {r: [] for r in range(scenario.ranks)}
    case = Case(scenario, simulation, store, InMemory(simulation), partial(init_simulated, simulation), logs)
    simulation.at_point = case.note_anywhere
    for fault in scenario.faults:
        if fault.how == "interrupt":
            simulation.interrupt_at[fault.rank] = fault.point
    CASES.append(case)
    quiet = logging.getLogger("commplane")
    before = quiet.disabled
    quiet.disabled = True  # a notice where warnings are errors is logged
    try:
        with warnings.catch_warnings(), _watched(case):
            warnings.simplefilter("error" if scenario.strict else "ignore", errors.CommplaneWarning)
            case.stuck = simulation.run({r: lambda r=r: rank_main(case, r) for r in range(scenario.ranks)})
    finally:
        quiet.disabled = before
        CASES.pop()
    return case


@contextmanager
def _watched(case: Case) -> Iterator[None]:
    """Write down every round. What waits is the method of the class, so that this needs no help from the code under test."""
    names = ("all_gather", "gather", "broadcast", "barrier", "farewell")
    real = {name: getattr(StoreBootstrap, name) for name in names}
    deep: dict[tuple[int, int], int] = {}

    def wrap(name: str) -> Callable[..., Any]:
        def call(self: StoreBootstrap, *args: Any, **kwargs: Any) -> Any:
            simulation = case.simulation
            place = (simulation.rank, id(self))
            deep[place] = deep.get(place, 0) + 1
            began = simulation.time
            try:
                return real[name](self, *args, **kwargs)
            finally:
                deep[place] -= 1
                if not deep[place]:  # a farewell holds a barrier: they are one wait
                    what = "farewell" if name == "farewell" else str(kwargs["what"])
                    case.waits.append(Wait(place[0], self._who, what, self.ranks, began, simulation.time))

        return call

    for name in names:
        setattr(StoreBootstrap, name, wrap(name))
    try:
        yield
    finally:
        for name in names:
            setattr(StoreBootstrap, name, real[name])


def _config(case: Case, rank: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "startup_timeout": STARTUP_S,
        "run_timeout": RUN_S,
        "flight_records": 0,
        "device": "cpu",
    }
    if case.strike("config", rank, None, None) is not None:
        fault = next(f for f in case.fired if (f.phase, f.rank) == ("config", rank))
        config["numerics"] = "backwards" if fault.how == "wrong" else "rank_order"
    return config


def rank_main(case: Case, rank: int) -> None:
    scenario = case.scenario
    everyone = range(scenario.ranks)
    version, absent, odd = "1.0", set(), set()
    config: dict[str, Any] = {}
    for fault in scenario.faults:
        if fault.rank != rank:
            continue
        if (fault.phase, fault.how) == ("plugins", "version"):
            version = "2.0"
        elif fault.phase == "spec" and fault.backend < scenario.backends:
            (absent if fault.how == "absent" else odd).add(BACKENDS[fault.backend])
        elif (fault.phase, fault.how) == ("plugins", "raise"):
            config["backends"] = ["missing"]
        if fault.phase in ("plugins", "spec"):
            case.fired[fault] = "init" if fault.phase == "plugins" else "create 0"
    plugins = host(rank, scenario.backends, frozenset(absent), frozenset(odd), version)
    case.strike("init", rank, None, None)
    config = {**_config(case, rank), **config}
    try:
        with case.step(rank, "init", everyone):
            plane = case.start(store=case.store, rank=rank, world_size=scenario.ranks, config=config, plugins=plugins)
    except (errors.CommplaneError, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            case.interrupted.add(rank)
        return
    try:
        _script(case, plane)
        with case.step(rank, "leave", everyone):
            plane.close()
    except BaseException as error:
        if rank in case.simulation.dead:
            raise
        if isinstance(error, KeyboardInterrupt):
            case.interrupted.add(rank)
            _fire_interrupt(case, rank)
        elif not isinstance(error, errors.CommplaneError) and "was told" not in str(error):
            case.simulation.failures.append((f"rank {rank}", error))
        with case.step(rank, "leave by exception", everyone):
            plane.__exit__(type(error), error, None)


def _fire_interrupt(case: Case, rank: int) -> None:
    for fault in case.scenario.faults:
        if (fault.how, fault.rank) == ("interrupt", rank) and fault not in case.fired:
            case._fire(fault)
            case.simulation.sleep(fault.seconds)


def _script(case: Case, plane: Plane) -> None:
    rank, groups = plane.rank, case.scenario.groups
    held: dict[int, Communicator] = {}
    mine = [(g, members) for g, members in enumerate(groups) if rank in members]
    for fault in case.scenario.faults:
        if (fault.phase, fault.rank) == ("order", rank) and len(mine) > 1:
            case.fired[fault] = "create 0"
            mine.reverse()
    for g, members in mine:
        case.strike("before", rank, g, None)
        wanted: Sequence[str] | None = case.scenario.wanted or None
        fault = next((f for f in case.scenario.faults if (f.phase, f.rank, f.group) == ("request", rank, g)), None)
        if fault is not None:
            case.fired[fault] = f"create {g}"
            wanted = ["nowhere"] if fault.how == "unknown" else ["c", "b", "a"][-case.scenario.backends - 1 :][:1]
            if fault.how == "differs" and tuple(wanted) == case.scenario.wanted:
                wanted = ["b"]
        _going_on(case, rank, f"create {g}", members, lambda g=g, m=members, w=wanted: _create(plane, held, g, m, w))
    for g, communicator in list(held.items()):
        _going_on(case, rank, f"prepare {g}", groups[g], lambda g=g, c=communicator: _prepare(case, g, c))
        _going_on(case, rank, f"empty {g}", groups[g], lambda g=g, c=communicator: _empty(case, g, c))
    for g, communicator in list(held.items()):
        _going_on(case, rank, f"use {g}", groups[g], lambda c=communicator: _use(c))
    _capture(case, plane, held)
    for g, communicator in held.items():
        case.strike("close", rank, g, None)
        with case.step(rank, f"close {g}", groups[g]):
            communicator.close()


def _going_on(case: Case, rank: int, name: str, members: Sequence[int], call: Callable[[], Any]) -> None:
    """One call; after an error that leaves the ranks in step the rank goes on, after another it leaves."""
    try:
        with case.step(rank, name, members) as record:
            record.value = call()
    except UNHURT:
        return
    except errors.AgreementError:
        # The group was not formed, and every rank of it knows; in a communicator it means that it is poisoned.
        if not name.startswith("create"):
            raise
    except errors.CommunicatorError as error:
        if isinstance(error, errors.PeerError):
            raise


def _create(plane: Plane, held: dict[int, Communicator], g: int, members: Sequence[int], wanted: Sequence[str] | None) -> Any:
    held[g] = plane.communicator(f"g{g}", members, backends=wanted)
    return held[g].plan


def _prepare(case: Case, g: int, communicator: Communicator) -> None:
    differs = _fault(case, "prepare", "differs", communicator, g)
    communicator.prepare(dtype="float32", max_bytes=128 if differs else 64)


def _empty(case: Case, g: int, communicator: Communicator) -> None:
    communicator.empty(5 if _fault(case, "empty", "differs", communicator, g) else 4, dtype=torch.float32)


def _fault(case: Case, phase: str, how: str, communicator: Communicator, g: int) -> bool:
    rank = communicator.ranks[communicator.rank]
    found = [f for f in case.scenario.faults if (f.phase, f.how, f.rank, f.group) == (phase, how, rank, g)]
    for fault in found:
        case.fired.setdefault(fault, f"{phase} {g}")
    return bool(found)


def _use(communicator: Communicator) -> list[float]:
    return communicator.all_reduce(torch.full((4,), float(communicator.rank + 1))).tolist()


def _capture(case: Case, plane: Plane, held: dict[int, Communicator]) -> None:
    rank = plane.rank
    members = sorted({r for g in held for r in case.scenario.groups[g]})
    first = next(iter(held), None)
    hows = {f.how for f in case.scenario.faults if (f.phase, f.rank) == ("capture", rank)}
    for fault in case.scenario.faults:
        if (fault.phase, fault.rank) == ("capture", rank) and first is not None:
            case.fired.setdefault(fault, "capture")
            if fault.how == "late":
                case.simulation.sleep(fault.seconds)
    with case.step(rank, "capture", members) as record, plane.capture():
        try:
            if "raise" in hows and first is not None:
                raise RuntimeError(f"as rank {rank} was told for capture")
            for communicator in held.values():
                communicator.all_reduce_(torch.ones(4))
            times = 1 + ("more" in hows) - ("fewer" in hows)
            for g, communicator in held.items():
                for _ in range(times if g == first else 1):
                    communicator.all_reduce_(torch.ones(1 if "other" in hows and g == first else LOCAL))
        except BaseException as error:
            record.body = error
            raise
