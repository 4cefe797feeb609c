"""Ranks in one process, on a clock of their own, one of them running at a time: the same every time for the same seed.

A rank is a thread that runs only while it holds the baton. It may lose it wherever it asks the clock, waits for a thread or calls
the store: there a random generator with a given seed decides who goes on. When nobody can, time jumps to the first that wakes. So
an hour of waiting takes no time, a deadline can be compared exactly, and a case that failed fails again.

Only the control plane is simulated (`commplane.agree.Clock`): what a backend waits for has to go through the simulation too.
"""

from __future__ import annotations

import heapq
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from commplane.agree import Clock

__all__ = ["Killed", "Simulation"]

# More turns than any case needs: who exceeds them waits for something that never comes, and asks for ever.
_MOST_TURNS = 5_000_000


class Killed(BaseException):
    """This rank is dead: raised wherever it asks for anything, so that nothing it does reaches the others."""


class _Over(BaseException):
    """The simulation ends; raised in what would wait for ever."""


@dataclass(eq=False)
class _Task:
    call: Callable[[], None]
    name: str
    rank: int
    main: bool
    gate: threading.Lock = field(default_factory=threading.Lock)
    wakeup: int = 0  # a wake-up that was asked for under an earlier number is none any more
    raises: BaseException | None = None


class _Carrier:
    """A thread that runs one task after the other, also of different simulations: starting one is what costs."""

    idle: list[_Carrier]

    def __init__(self) -> None:
        self.job = threading.Lock()
        self.job.acquire()
        self.task: tuple[Simulation, _Task] | None = None
        threading.Thread(target=self._serve, name="commplane simulation", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.job.acquire()
            assert self.task is not None
            simulation, task = self.task
            task.gate.acquire()
            try:
                if task.raises is None:
                    task.call()
            except (Killed, _Over):  # how a rank and a simulation end
                pass
            except BaseException as error:
                simulation.failures.append((task.name, error))
            del task
            self.task = None
            simulation._finish(self)
            del simulation


_Carrier.idle = []


class Simulation:
    """Virtual ranks on a virtual clock.

    Args:
        seed: of every choice.
        restless: how likely it is, from 0 to 1, that a rank loses the baton where it may.

    Attributes:
        clock: what the control plane of each rank waits by.
        time: seconds since the beginning.
        silent: rank -> when the store answers it again, infinity for never; a call made before is made then.
        points: rank -> how often it could have lost the baton.
        kill_at: rank -> number of such a point at which it dies.
        interrupt_at: rank -> number of a point of its own thread at which `KeyboardInterrupt` is raised.
        at_point: called with the rank at each point; for what is to begin there.
        failures: name and exception of threads that ended in one which nobody caught.
    """

    def __init__(self, seed: int, restless: float = 0.5) -> None:
        self.clock = SimulatedClock(self)
        self.time = 0.0
        self.silent: dict[int, float] = {}
        self.points: Counter[int] = Counter()
        self.kill_at: dict[int, int] = {}
        self.interrupt_at: dict[int, int] = {}
        self.at_point: Callable[[int], None] | None = None
        self.failures: list[tuple[str, BaseException]] = []
        self.dead: set[int] = set()
        self._main_points: Counter[int] = Counter()
        self._random = random.Random(seed)
        self._restless = restless
        self._ready: list[_Task] = []
        self._alive: list[_Task] = []
        self._later: list[tuple[float, int, Any, int]] = []  # (when, order, task or call, number of the wake-up)
        self._order = 0
        self._turns = 0
        self._current: _Task | None = None
        self._driver = threading.Lock()
        self._driver.acquire()

    @property
    def rank(self) -> int:
        """The rank that is running; -1 in a call that was put off."""
        return -1 if self._current is None else self._current.rank

    @property
    def _task(self) -> _Task:
        assert self._current is not None, "only what runs in a simulation has a rank"
        return self._current

    def run(self, calls: dict[int, Callable[[], None]]) -> list[str]:
        """Make each rank's call; return when they and everything that they started are done.

        Returns:
            The names of threads that would have waited for ever; they were ended.
        """
        for rank, call in calls.items():
            self.start(call, f"rank {rank}", rank=rank, main=True)
        self._drive()
        stuck = [task.name for task in self._alive]
        while self._alive:
            for task in self._alive:
                self._throw(task, _Over())
            self._drive()
        return stuck

    def _drive(self) -> None:
        task = self._pick()
        if task is not None:
            self._pass_to(task)
            self._driver.acquire()

    def start(self, call: Callable[[], None], name: str, *, rank: int | None = None, main: bool = False) -> None:
        """A new thread of `rank`, by default of the one that is running."""
        task = _Task(call, name, self.rank if rank is None else rank, main)
        task.gate.acquire()
        carrier = _Carrier.idle.pop() if _Carrier.idle else _Carrier()
        carrier.task = (self, task)
        carrier.job.release()
        self._alive.append(task)
        self._ready.append(task)

    def point(self) -> None:
        """Here the rank may die, be interrupted, or lose the baton."""
        self._count()
        if self._ready and self._random.random() < self._restless:
            task = self._task
            self._ready.append(task)
            self._wait_for_turn(task)

    def sleep(self, seconds: float) -> None:
        """Pause for so long."""
        self._count()
        self._block(self.time + max(seconds, 0.0))

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Make `call`, which asks the simulation for nothing, when that time has come."""
        self._order += 1
        heapq.heappush(self._later, (when, self._order, call, 0))

    def kill(self, rank: int) -> None:
        """`rank` dies: no thread of it does anything any more."""
        self.dead.add(rank)
        for task in list(self._alive):
            if task.rank == rank and task is not self._current:
                self._throw(task, Killed())

    def _count(self) -> None:
        task = self._task
        rank = task.rank
        if rank in self.dead:
            raise Killed
        self.points[rank] += 1
        if self.at_point is not None:
            self.at_point(rank)
        if self.kill_at.get(rank) == self.points[rank]:
            self.kill(rank)
            raise Killed
        if task.main:
            self._main_points[rank] += 1
            if self.interrupt_at.get(rank) == self._main_points[rank]:
                raise KeyboardInterrupt

    # The baton.

    def _throw(self, task: _Task, error: BaseException) -> None:
        task.raises = error
        if task not in self._ready:
            self._wake(task)

    def _wake(self, task: _Task) -> None:
        task.wakeup += 1
        self._ready.append(task)

    def _block(self, until: float | None) -> None:
        task = self._task
        if until is not None:
            self._order += 1
            heapq.heappush(self._later, (until, self._order, task, task.wakeup))
        self._wait_for_turn(task)

    def _wait_for_turn(self, task: _Task) -> None:
        chosen = self._pick()
        if chosen is not task:
            if chosen is None:
                self._driver.release()
            else:
                self._pass_to(chosen)
            task.gate.acquire()
        self._current = task
        if task.raises is not None:
            error, task.raises = task.raises, None
            raise error

    def _pass_to(self, task: _Task) -> None:
        self._current = task
        task.gate.release()

    def _pick(self) -> _Task | None:
        self._turns += 1
        if self._turns > _MOST_TURNS:
            raise RuntimeError(f"the simulation has not ended after {_MOST_TURNS} turns, at {self.time:g} s")
        while True:
            if self._ready:
                i = self._random.randrange(len(self._ready))
                self._ready[i], self._ready[-1] = self._ready[-1], self._ready[i]
                return self._ready.pop()
            if not self._later:
                return None
            when, _, what, wakeup = heapq.heappop(self._later)
            if isinstance(what, _Task):
                if what.wakeup == wakeup:
                    self.time = max(self.time, when)
                    self._wake(what)
                    while self._later and self._later[0][0] <= self.time and isinstance(self._later[0][2], _Task):
                        _, _, other, wakeup = heapq.heappop(self._later)
                        if other.wakeup == wakeup:
                            self._wake(other)
            else:
                self.time = max(self.time, when)
                running, self._current = self._current, None
                what()
                self._current = running

    def _finish(self, carrier: _Carrier) -> None:
        self._alive.remove(self._task)
        chosen = self._pick()
        self._current = None
        _Carrier.idle.append(carrier)
        if chosen is None:
            self._driver.release()
        else:
            self._pass_to(chosen)


class SimulatedSignal:
    """`commplane.agree.clock.Signal` on a simulation."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._set = False
        self._waiting: list[tuple[_Task, int]] = []

    def set(self) -> None:
        """Let go who waits."""
        self._set = True
        for task, wakeup in self._waiting:
            if task.wakeup == wakeup:
                self._simulation._wake(task)
        self._waiting.clear()

    def is_set(self) -> bool:
        """Whether `set` was called."""
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` virtual seconds; whether `set` was called."""
        simulation = self._simulation
        if not self._set:
            simulation._count()
            self._waiting.append((simulation._task, simulation._task.wakeup))
            simulation._block(None if timeout is None else simulation.time + max(timeout, 0.0))
        return self._set


class _SimulatedWorker:
    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def submit(self, call: Callable[[], None]) -> None:
        """At once, after a turn of the others; later, or never, where the store is silent."""
        simulation = self._simulation
        simulation.point()
        until = simulation.silent.get(simulation.rank, 0.0)
        if until <= simulation.time:
            call()
        elif until != float("inf"):
            simulation.at(until, call)


class SimulatedClock(Clock):
    """The clock of all ranks of a simulation."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def now(self) -> float:
        """Virtual seconds."""
        return self._simulation.time

    def sleep(self, seconds: float) -> None:
        """Pause in virtual time."""
        self._simulation.sleep(seconds)

    def signal(self) -> SimulatedSignal:
        """A new signal, not set."""
        return SimulatedSignal(self._simulation)

    def start(self, call: Callable[[], None], name: str) -> None:
        """A thread of the rank that is running."""
        self._simulation.start(call, name)

    def worker(self, name: str) -> _SimulatedWorker:
        """Makes calls in the thread that asks, where the store answers."""
        return _SimulatedWorker(self._simulation)
