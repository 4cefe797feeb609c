"""Processes as ranks on GPUs, kept between tests: to start torch and CUDA costs more than most tests.

One rank a GPU where there are enough, else all ranks on GPU 0 under an MPS daemon of this run. No setting of a GPU is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_mps import MPS_CONTROL, Mps

import commplane
from commplane.runtime import Communicator, Plane
from commplane.testing import PluginHost, without_canary

GPUS = torch.cuda.device_count()  # through NVML: this process makes no context
WANTED = tuple(int(n) for n in os.environ.get("GPU_TEST_RANKS", "2,3,4").split(","))
"""Sizes of groups; GPU_TEST_RANKS=2,3,4,8 for more."""

TIMEOUT_S = 10.0
STARTUP_S = 60.0
_LIMIT_S = 100.0
_GRACE_S = 15.0
_PR_SET_PDEATHSIG = 1


def needs_gpu() -> list[pytest.MarkDecorator]:
    """The marks of a module of this folder."""
    return [
        pytest.mark.gpu,
        pytest.mark.timeout(170),
        pytest.mark.skipif(GPUS == 0, reason="wants a CUDA device, this machine shows none"),
    ]


def sizes(least: int = 2, most: int = 8) -> list[Any]:
    """A case for each size of a group, skipped with the reason where this machine has no place for it."""
    out = []
    for n in [n for n in WANTED if least <= n <= most] or [least]:
        problem = misplaced(n)
        out.append(pytest.param(n, id=f"{n}-ranks", marks=[pytest.mark.skipif(problem is not None, reason=problem or "")]))
    return out


def misplaced(size: int) -> str | None:
    """Why there is no place for `size` ranks here."""
    if size <= GPUS or (GPUS and MPS_CONTROL):
        return None
    return f"wants {size} GPUs, or one and nvidia-cuda-mps-control; found {GPUS} GPUs and {MPS_CONTROL or 'no such command'}"


@dataclass(frozen=True)
class Job:
    """What a rank is started with."""

    rank: int
    world_size: int
    port: int
    ordinal: int
    env: Mapping[str, str]
    config: Mapping[str, Any]
    log: str
    plugins: tuple[str, ...]


@dataclass
class Rank:
    """What a function of a test is given."""

    job: Job
    store: Any
    plane: Plane
    comms: dict[str, Communicator] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.job.rank

    @property
    def world_size(self) -> int:
        return self.job.world_size

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.job.ordinal)

    @property
    def shared(self) -> bool:
        """Whether all ranks are on one GPU."""
        return "CUDA_MPS_PIPE_DIRECTORY" in self.job.env

    @property
    def backend(self) -> str:
        """Whose communicators `form` makes: the first of the world's plugins."""
        return self.job.plugins[0]

    def form(self, name: str, ranks: list[int] | None = None, *, canary: bool = False, **options: Any) -> Communicator:
        """A new communicator of `backend`; `options` are its own settings. Collective over `ranks`.

        With `canary`, what does not work is left out: NCCL, where ranks share a GPU.
        """
        with contextlib.nullcontext() if canary else without_canary():
            comm = self.plane.communicator(
                name, ranks, device=str(self.device), backends=[self.backend], options={self.backend: options}
            )
        if comm.plan.backends[0] != self.backend:
            found = [(c.name, c.state, c.reason) for c in comm.plan.candidates]
            comm.close()
            raise AssertionError(f"{self.backend} is not in the plan: {found}")
        return comm

    def comm(self, **options: Any) -> Communicator:
        """The communicator over all ranks with these settings: made by the first call, kept for later ones. Collective."""
        name = "_".join(["tp", *(f"{k}_{v}" for k, v in sorted(options.items()))])
        known = self.comms.get(name)
        if known is None or known.closed:
            known = self.comms[name] = self.form(name, **options)
        return known


def only(*names: str) -> PluginHost:
    """The plugins of these wheels of the repository, and core's own."""
    out = PluginHost()
    for name in names:
        dist = f"commplane-{name.replace('_', '-')}"
        out.register(importlib.import_module(f"commplane_{name}.plugin"), name, dist=dist, version=metadata.version(dist))
    return out


def main(connection: Connection, job: Job) -> None:
    """Serve until the other end closes. The first message back says whether the rank came up."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(job.env)  # CUDA reads them when it is first used, which is below
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()
    torch.set_num_threads(1)
    rank: Rank | None = None

    def start() -> None:
        nonlocal rank
        from torch.distributed import TCPStore

        torch.cuda.set_device(job.ordinal)
        store = TCPStore("127.0.0.1", job.port, is_master=False)
        plane = commplane.init(
            store=store, rank=job.rank, world_size=job.world_size, config=job.config, plugins=only(*job.plugins)
        )
        rank = Rank(job, store, plane)

    connection.send(answer(start))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            break
        connection.send(answer(lambda: function(rank, *args)))  # noqa: B023  called before the next round
    if rank is not None:
        rank.plane.close()


def answer(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": call()}
    except BaseException as error:  # whatever it is, the test looks at it
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"kinds": kinds, "message": str(error), "trace": trace}


class RankFailed(AssertionError):
    """Ranks failed in a function of a test; the text has the reason of each."""


class World:
    """`size` processes as ranks, on GPUs of their own or under MPS on one."""

    def __init__(
        self,
        size: int,
        mps: Mapping[str, str] | None,
        cache: str,
        plugins: tuple[str, ...],
        more_env: Mapping[str, str],
        **config: Any,
    ) -> None:
        from torch.distributed import TCPStore

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "commplane", "commplane.testing", "commplane.ops"])
        self.size, self.usable = size, True
        self._folder = tempfile.TemporaryDirectory(prefix="commplane-gpu-")
        settings = {"timeout": TIMEOUT_S, "startup_timeout": STARTUP_S, "flight_dir": self._folder.name, **config}
        settings.setdefault("tuning", "off")  # a backend is tested at every size, also where another is faster
        env = {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", **more_env, **(mps or {})}
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._logs = [f"{self._folder.name}/rank{rank}.log" for rank in range(size)]
        for rank, log in enumerate(self._logs):
            ours, theirs = context.Pipe()
            job = Job(rank, size, self._store.port, 0 if mps else rank, env, settings, log, plugins)
            process = context.Process(target=main, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        try:
            self._require(self._gather(_LIMIT_S), "the start of the ranks")
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[..., Any], *args: Any, limit: float = _LIMIT_S) -> list[Any]:
        """``function(rank, *args)``, a module-level function, on every rank: the results, by rank. RankFailed if one failed."""
        return self._require(self.outcomes(function, *args, limit=limit), function.__name__)

    def outcomes(
        self, function: Callable[..., Any], *args: Any, limit: float = _LIMIT_S, without: Collection[int] = ()
    ) -> list[dict[str, Any]]:
        """How the function ended on each rank: what `answer` says, or ``{"died": exit code}``, or ``{"hung": log}``."""
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # a process that has ended is found below
                connection.send((function, args))
        return self._gather(limit, without)

    def _gather(self, limit: float, without: Collection[int] = ()) -> list[dict[str, Any]]:
        deadline = time.monotonic() + limit
        answers: dict[int, dict[str, Any]] = {}
        waiting = dict(enumerate(self._connections))
        while waiting.keys() - set(without) and (left := deadline - time.monotonic()) > 0:
            for ready in wait_for(list(waiting.values()), left):
                rank = next(r for r, connection in waiting.items() if connection is ready)
                del waiting[rank]
                answers[rank] = self._receive(rank)
                if "result" not in answers[rank]:  # the others now wait for it in vain
                    deadline = min(deadline, time.monotonic() + TIMEOUT_S + _GRACE_S)
        for rank in waiting:
            answers[rank] = {"hung": self._end(rank)}
        self.usable &= all("result" in one for one in answers.values())
        return [answers[rank] for rank in range(self.size)]

    def _receive(self, rank: int) -> dict[str, Any]:
        try:
            said: dict[str, Any] = self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(10)
            return {"died": self._processes[rank].exitcode, "trace": self._tail(rank)}
        return said

    def _require(self, outcomes: list[dict[str, Any]], what: str) -> list[Any]:
        bad = {rank: one for rank, one in enumerate(outcomes) if "result" not in one}
        if bad:
            lines = "\n".join(f"--- rank {rank}: {one.get('trace') or one}" for rank, one in bad.items())
            raise RankFailed(f"{len(bad)} of {self.size} ranks failed in {what}\n{lines}")
        return [one["result"] for one in outcomes]

    def _tail(self, rank: int) -> str:
        log = Path(self._logs[rank])
        return "\n".join(log.read_text(errors="replace").splitlines()[-60:]) if log.exists() else ""

    def _end(self, rank: int) -> str:
        """End a process that hangs; where its threads were."""
        process = self._processes[rank]
        for number in (signal.SIGCONT, signal.SIGABRT):  # the fault handler writes the stacks on SIGABRT
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        process.join(5)
        process.kill()
        process.join()
        return self._tail(rank)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to the process of a rank."""
        os.kill(self._processes[rank].pid, number)

    def close(self) -> None:
        """End all processes: those of a world that is in order leave together, others are killed. Idempotent."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + (20 if self.usable else 2)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        self._folder.cleanup()


class Worlds:
    """The shared worlds of a run, one for each size, started when first wanted and again after a failure.

    `plugins` are the wheels that their ranks see; the first is the one that `Rank.form` uses.
    """

    def __init__(self, *plugins: str, env: Mapping[str, str] | None = None) -> None:
        self._plugins, self._env = plugins, dict(env or {})
        self._worlds: dict[int, World] = {}
        self._short: dict[tuple[int, float], World] = {}
        self._mps: Mps | None = None
        self._cache = tempfile.TemporaryDirectory(prefix="commplane-gpu-cache-")  # of the proof that memory goes everywhere

    def get(self, size: int) -> World:
        """The shared world of that size."""
        world = self._worlds.get(size)
        if world is None or not world.usable:
            self._end(world, size)
            self._worlds[size] = world = self._start(size)
        return world

    def _end(self, world: World | None, size: int) -> None:
        """Close a world that is used up. A client of MPS that was killed can keep others out: a new daemon, then."""
        if world is None:
            return
        world.close()
        if size > GPUS:
            self._renew_mps()

    def _renew_mps(self) -> None:
        for world in [*self._worlds.values(), *self._short.values()]:
            if world.size > GPUS:
                world.close()
        self._worlds = {size: world for size, world in self._worlds.items() if size <= GPUS}
        self._short = {key: world for key, world in self._short.items() if key[0] <= GPUS}
        self._stop_mps()

    def _start(self, size: int, **config: Any) -> World:
        if size > GPUS and self._mps is None:
            self._mps = Mps()
        return World(
            size, self._mps.env(size) if size > GPUS and self._mps else None, self._cache.name, self._plugins, self._env, **config
        )

    @contextlib.contextmanager
    def fresh(self, size: int, **config: Any) -> Iterator[World]:
        """A world of its own, for a test that loses ranks."""
        world = self._start(size, **config)
        try:
            yield world
        finally:
            usable = world.usable
            world.close()
            if not usable and size > GPUS:
                self._renew_mps()

    @contextlib.contextmanager
    def short(self, size: int, timeout: float) -> Iterator[World]:
        """A world whose kernels wait no longer than `timeout` seconds; kept, for tests after which a new communicator works."""
        known = self._short.get((size, timeout))
        if known is None or not known.usable:
            self._end(known, size)
            known = self._short[size, timeout] = self._start(size, timeout=timeout, run_timeout=timeout, startup_timeout=30.0)
        yield known

    def env(self, size: int) -> dict[str, str]:
        """Variables for processes that a test starts itself: with MPS where `size` ranks share a GPU."""
        if size > GPUS and self._mps is None:
            self._mps = Mps()
        return {"XDG_CACHE_HOME": self._cache.name, **(self._mps.env(size) if size > GPUS and self._mps else {})}

    def close_worlds(self) -> None:
        worlds: list[World] = [*self._worlds.values(), *self._short.values()]
        self._worlds, self._short = {}, {}
        for world in worlds:
            world.close()

    def _stop_mps(self) -> None:
        mps, self._mps = self._mps, None
        if mps is not None:
            mps.stop()

    def close(self) -> None:
        """End everything, whatever happened."""
        try:
            self.close_worlds()
        finally:
            self._stop_mps()
            self._cache.cleanup()
