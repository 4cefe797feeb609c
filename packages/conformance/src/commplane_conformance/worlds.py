"""Processes as ranks, kept between tests: starting one costs more than most tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from typing import Any

import pytest

from commplane_conformance.rank import Job, main, tail
from commplane_conformance.subject import Subject

__all__ = ["Outcome", "RankFailed", "World", "Worlds"]

# Of a function in a shared world: far above what any takes, so that only a hang meets it.
_LIMIT_S = 60.0

# Once one rank has failed, the others are waiting for it in vain.
_GRACE_S = 3.0

# Settings of the shared worlds. A rank that waits this long in a test that loses no rank will wait for ever.
_CONFIG = {"timeout": 30.0}


class RankFailed(AssertionError):
    """Ranks failed in a function of a test; the text has the reason of each."""


@dataclass(frozen=True)
class Outcome:
    """How a function ended on one rank.

    Attributes:
        rank: global rank.
        ended: ``returned``, ``raised``, ``skipped``, ``died`` or ``hung``.
        result: what it returned.
        kinds: names of the class of its exception and of the bases.
        message: text of the exception, or why it was skipped.
        missing: the missing ranks that the exception names.
        trace: its traceback, or the end of the log of a process that died or hung.
    """

    rank: int
    ended: str
    result: Any = None
    kinds: tuple[str, ...] = ()
    message: str = ""
    missing: tuple[int, ...] = ()
    trace: str = ""

    def __str__(self) -> str:
        if self.ended == "raised":
            return f"rank {self.rank} raised {self.kinds[0]}: {self.message}"
        return f"rank {self.rank} {self.ended}{f': {self.message}' if self.message else ''}"


class World:
    """`size` processes as ranks.

    Args:
        subject: the backend under test.
        size: number of ranks.
        config: settings of all ranks.
        form: whether a communicator over all ranks is formed at once.
    """

    def __init__(
        self,
        subject: Subject,
        size: int,
        *,
        config: Mapping[str, Any] | None = None,
        form: bool = True,
    ) -> None:
        from torch.distributed import TCPStore

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["commplane_conformance.rank"])
        self.subject = subject
        self.size = size
        self.usable = True
        self._folder = tempfile.TemporaryDirectory(prefix="commplane-conformance-")
        settings = {**_CONFIG, "flight_dir": self._folder.name, **(config or {})}
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._logs: list[str] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            log = f"{self._folder.name}/rank{rank}.log"
            host = {} if subject.hosts == 1 else {"host_alias": f"host{rank * subject.hosts // size}"}
            job = Job(subject.name, subject.device, rank, size, self._store.port, {**settings, **host}, form, log)
            process = context.Process(target=main, args=(theirs, job), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._logs.append(log)
        try:
            self._require(self._gather(_LIMIT_S), "the start of the ranks")
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[..., Any], *args: Any, limit: float = _LIMIT_S) -> list[Any]:
        """Call ``function(rank, *args)``, a module-level function, on every rank: the results, by rank.

        Raises:
            RankFailed: a rank raised, died or hung. The world is then used up.
        """
        outcomes = self.outcomes(function, *args, limit=limit)
        return self._require(outcomes, function.__name__)

    def outcomes(
        self,
        function: Callable[..., Any],
        *args: Any,
        limit: float = _LIMIT_S,
        grace: float | None = _GRACE_S,
        without: Collection[int] = (),
    ) -> list[Outcome]:
        """The same, for a function in which ranks are meant to fail: how it ended on each.

        A rank that has not come back after `limit` seconds, or `grace` seconds after another one failed, has hung; its process
        is ended. Ranks in `without` are not waited for once all others have come back. What hangs, dies or raises uses the world
        up.
        """
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # a process that has ended is found below
                connection.send((function, args))
        return self._gather(limit, grace, without)

    def _gather(self, limit: float, grace: float | None = _GRACE_S, without: Collection[int] = ()) -> list[Outcome]:
        deadline = time.monotonic() + limit
        answers: dict[int, Outcome] = {}
        waiting = dict(enumerate(self._connections))
        while waiting.keys() - set(without) and (left := deadline - time.monotonic()) > 0:
            for ready in wait_for(list(waiting.values()), left):
                rank = next(r for r, connection in waiting.items() if connection is ready)
                del waiting[rank]
                answers[rank] = self._receive(rank)
                if answers[rank].ended not in ("returned", "skipped") and grace is not None:
                    deadline = min(deadline, time.monotonic() + grace)
        for rank in waiting:
            answers[rank] = Outcome(rank, "hung", trace=self._end(rank))
        outcomes = [answers[rank] for rank in range(self.size)]
        if any(o.ended not in ("returned", "skipped") for o in outcomes):
            self.usable = False
        return outcomes

    def _receive(self, rank: int) -> Outcome:
        try:
            answer = self._connections[rank].recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(10)
            return Outcome(rank, "died", message=f"exit code {self._processes[rank].exitcode}", trace=tail(self._logs[rank]))
        if "result" in answer:
            return Outcome(rank, "returned", answer["result"])
        if "skip" in answer:
            return Outcome(rank, "skipped", message=answer["skip"])
        return Outcome(rank, "raised", None, tuple(answer["kinds"]), answer["message"], tuple(answer["missing"]), answer["trace"])

    def _require(self, outcomes: list[Outcome], what: str) -> list[Any]:
        bad = [o for o in outcomes if o.ended in ("raised", "died", "hung")]
        if bad:
            # Who only lost a peer is the consequence: the cause comes first.
            causes = [o for o in bad if "PeerError" not in o.kinds and o.ended != "hung"] or bad
            lines = "\n".join(f"  {o}" for o in [*causes, *(o for o in bad if o not in causes)])
            raise RankFailed(f"{len(bad)} of {self.size} ranks failed in {what}\n{lines}\n\n{causes[0].trace}")
        skips = [o.message for o in outcomes if o.ended == "skipped"]
        if skips:
            pytest.skip(skips[0])
        return [o.result for o in outcomes]

    def _end(self, rank: int) -> str:
        """End a process that hangs; where its threads were."""
        process = self._processes[rank]
        for number in (signal.SIGCONT, signal.SIGABRT):  # the fault handler writes the stacks on SIGABRT
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        process.join(5)
        process.kill()
        process.join()
        return tail(self._logs[rank])

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to the process of a rank."""
        os.kill(self._processes[rank].pid, number)

    def close(self) -> None:
        """End all processes: those of a world that is in order leave together, others are killed. Idempotent."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + (10 if self.usable else 0)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        self._folder.cleanup()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Worlds:
    """The shared worlds of a run, one for each size, started when first wanted and again after a failure."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._worlds: dict[int, World] = {}
        self._broken: dict[int, str] = {}

    def get(self, size: int) -> World:
        """The shared world of that size.

        Raises:
            RankFailed: it did not come up; later calls raise the same at once.
        """
        if size in self._broken:
            raise RankFailed(self._broken[size])
        world = self._worlds.get(size)
        if world is not None and world.usable:
            return world
        if world is not None:
            world.close()
        try:
            self._worlds[size] = World(self.subject, size)
        except RankFailed as failed:
            self._broken[size] = str(failed)
            raise
        return self._worlds[size]

    @contextlib.contextmanager
    def fresh(self, size: int, **options: Any) -> Iterator[World]:
        """A world of its own, for a test that loses ranks. The options are `World`'s."""
        with World(self.subject, size, **options) as world:
            yield world

    def close(self) -> None:
        """End all of them."""
        for world in self._worlds.values():
            world.close()
