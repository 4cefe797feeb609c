"""What runs in a process of the kit: one rank, with a plane and a communicator, that does what the tests send it.

The fork server loads this module once, torch with it, so that a new rank costs a fork.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

import commplane
from commplane.api import BackendSpec, Collective, CommBackend
from commplane.runtime import Communicator, Plane
from commplane.testing import without_canary

__all__ = ["Job", "Rank", "Skip", "main", "tail"]

_PR_SET_PDEATHSIG = 1


class Skip(Exception):
    """The case does not exist for this backend; the text says why. Raised on every rank alike."""


@dataclass(frozen=True)
class Job:
    """What a rank is started with.

    Attributes:
        backend: name of the backend under test.
        device: ``cpu`` or ``cuda``.
        rank: global rank.
        world_size: number of ranks.
        port: of the store, on this host.
        config: settings.
        form: whether a communicator over all ranks is formed at once.
        log: file for what the rank prints.
    """

    backend: str
    device: str
    rank: int
    world_size: int
    port: int
    config: Mapping[str, Any]
    form: bool
    log: str


@dataclass
class Rank:
    """What a function of a test is given: this rank's plane, and the communicator under test.

    Attributes:
        job: how it was started.
        plane: this rank's.
        comms: communicators that later functions of the same test go on with.
        asked: how often `serves` was asked in this function, and `served` how often it said yes.
        calls: of this function, how many went to the backend under test (True) and to others; counted where it has limits.
    """

    job: Job
    plane: Plane
    comms: dict[str, Communicator] = field(default_factory=dict)
    asked: int = 0
    served: int = 0
    calls: Counter[bool] = field(default_factory=Counter)

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.job.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.job.world_size

    @property
    def comm(self) -> Communicator:
        """The communicator over all ranks."""
        return self.comms["conformance"]

    @property
    def spec(self) -> BackendSpec:
        """What the backend declares."""
        spec = self.plane.plugins.backends(self.job.device)[self.job.backend].spec
        assert isinstance(spec, BackendSpec)
        return spec

    @property
    def device(self) -> torch.device:
        """Where tensors go."""
        return torch.device(self.comm.device if "conformance" in self.comms else self.job.device)

    def form(self, name: str, ranks: Sequence[int] | None = None) -> Communicator:
        """A communicator whose plan holds the backend, without the canary. Collective over `ranks`."""
        if ranks is not None and len(ranks) < self.spec.min_world_size:
            raise Skip(f"{self.job.backend} declares that it serves groups of {self.spec.min_world_size} ranks or more")
        with without_canary():
            comm = self.plane.communicator(name, ranks, device=self.job.device, backends=[self.job.backend])
        self.require(comm)
        limited = self.spec.min_bytes or self.spec.max_bytes is not None or comm.plan.offers
        if limited:  # else all goes to it, and nothing is put before its calls
            for name, backend in zip(comm.plan.backends, comm.backends, strict=True):
                self._count(backend, name == self.job.backend)
        return comm

    def _count(self, backend: CommBackend, ours: bool) -> None:
        bind = backend.bind

        def bind_counted(*args: Any, **options: Any) -> Callable[..., Any]:
            call = bind(*args, **options)

            def counted(*arguments: Any) -> Any:
                self.calls[ours] += 1
                return call(*arguments)

            return counted

        backend.bind = bind_counted  # type: ignore[method-assign]

    def require(self, comm: Communicator) -> None:
        """Raise unless the backend under test is in the plan of `comm`."""
        if self.job.backend not in comm.plan.backends:
            candidate = next(c for c in comm.plan.candidates if c.name == self.job.backend)
            raise AssertionError(
                f"backend {self.job.backend!r} is not in the plan of {comm.key}: {candidate.state}: {candidate.reason}"
            )

    def backend(self, comm: Communicator) -> CommBackend:
        """The backend object of `comm` that is under test."""
        return comm.backends[comm.plan.backends.index(self.job.backend)]

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` on this rank's device: what a collective does to it leaves the original alone."""
        return tensor.to(self.device, copy=True)

    def serves(self, comm: Communicator, collective: Collective, nbytes: int, dtype: torch.dtype, op: str = "sum") -> bool:
        """Whether the backend under test runs this call; one outside of its limits goes to another backend of the plan."""
        yes = comm.plan.explain(str(collective), nbytes=nbytes, dtype=dtype, op=op).chosen == self.job.backend
        self.asked, self.served = self.asked + 1, self.served + yes
        return yes


def main(connection: Connection, job: Job) -> None:
    """Serve until the other end closes. The first message back says whether the rank came up."""
    _end_with_pytest()
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()
    torch.set_num_threads(1)
    rank: Rank | None = None

    def start() -> None:
        nonlocal rank
        if job.device == "cuda":
            torch.cuda.set_device(job.rank % torch.cuda.device_count())
        store = TCPStore("127.0.0.1", job.port, is_master=False)
        # A backend is held to its word at every size, also where times that ship or were measured give the call to another.
        config = {"tuning": "off", **job.config}
        plane = commplane.init(store=store, rank=job.rank, world_size=job.world_size, config=config)
        rank = Rank(job, plane)
        if job.form:
            rank.comms["conformance"] = rank.form("conformance")

    connection.send(_answer(start))
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            break
        connection.send(_answer(lambda: _run(rank, function, args)))  # noqa: B023  called before the next round
    if rank is not None:
        rank.plane.close()


def _end_with_pytest() -> None:
    """Also where that was killed, and this rank hangs or is stopped: the fork server ends with pytest, and this rank with it.

    Unless somebody holds the pipe on which the server waits for pytest's end, and every process that it forks is given that.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server: Any = forkserver._forkserver
    os.close(server._forkserver_alive_fd)
    server._forkserver_alive_fd = None


def _run(rank: Rank | None, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    assert rank is not None  # the tests are given no world that did not come up
    rank.asked = rank.served = 0
    rank.calls.clear()
    result = function(rank, *args)
    if (rank.asked and not rank.served) or (rank.calls[False] and not rank.calls[True]):
        raise Skip(f"no call of this case is within the limits that {rank.job.backend} declares")
    return result


def _answer(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"result": call()}
    except Skip as skip:
        return {"skip": str(skip)}
    except BaseException as error:  # whatever it is, the test looks at it
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        kinds = [kind.__name__ for kind in type(error).__mro__]
        missing = list(getattr(error, "missing_ranks", ()))
        return {"kinds": kinds, "message": str(error), "trace": trace, "missing": missing}


def tail(log: str, lines: int = 40) -> str:
    """The end of what a rank printed."""
    path = Path(log)
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
