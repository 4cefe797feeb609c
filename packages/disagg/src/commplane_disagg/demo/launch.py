"""The processes of the ranks: started together, ended together, and none left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO

import msgspec

from commplane_disagg.demo.job import Job, Outcome
from commplane_disagg.demo.network import Node

__all__ = ["SILENT", "Process", "Ranks"]

SILENT = "silent"
"""In the place of an error's class: the rank could not say how it ended."""

_POLL = 0.02


class Process:
    """One rank. Its output goes to files without a name: they are gone with the last process that has them open."""

    def __init__(self, job: Job, node: Node) -> None:
        self.job = job
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        descriptor = self._said.fileno()
        self._process = subprocess.Popen(
            [*node.command, sys.executable, "-m", "commplane_disagg.demo.rank", str(os.getpid()), str(descriptor)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node.interface, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[descriptor],
            start_new_session=True,  # Ctrl-C is for the process that ends all of them
        )
        assert self._process.stdin is not None
        # Not an argument: others may read those, and the token is in it. A rank that is gone already is found to be so later.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(msgspec.msgpack.encode(job))

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.job.side} rank {self.job.rank} on node {self.job.node}"

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    @property
    def pid(self) -> int:
        """Of the rank itself: what is put before it to enter a namespace executes it."""
        return self._process.pid

    def log(self) -> str:
        """What it wrote so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def outcome(self) -> Outcome:
        """What it said, or what can be said of it."""
        size = os.fstat(self._said.fileno()).st_size
        if size:
            return msgspec.msgpack.decode(os.pread(self._said.fileno(), size, 0), type=Outcome)
        code = self.returncode
        if code is None:
            return Outcome(error=SILENT, message="was still running at the deadline, and is killed now")
        what = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return Outcome(error=SILENT, message=f"{what} and said nothing; its log ends: {self.log()[-500:].strip() or '(empty)'}")

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """End it, if it runs, and forget it. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()
        self._said.close()


class Ranks:
    """All ranks. A context manager that leaves none; if this process is killed itself, the kernel ends them with it."""

    def __init__(self, jobs: Sequence[Job], nodes: Sequence[Node]) -> None:
        self.processes: list[Process] = []
        try:
            for job in jobs:
                self.processes.append(Process(job, nodes[job.node]))
        except BaseException:
            self.close()
            raise

    def wait(self, timeout: float, *, grace: float, meanwhile: Callable[[], None]) -> list[Outcome]:
        """How each rank ended.

        Args:
            meanwhile: called many times a second.
            timeout: seconds for all of it.
            grace: seconds that the others may go on once one has failed; their own deadlines should end them before.
        """
        deadline, failed = time.monotonic() + timeout, False
        while time.monotonic() < deadline:
            codes = [process.returncode for process in self.processes]
            if None not in codes:
                break
            if not failed and any(codes):
                failed, deadline = True, min(deadline, time.monotonic() + grace)
            meanwhile()
            time.sleep(_POLL)
        return [process.outcome() for process in self.processes]

    def close(self) -> None:
        """Kill what still runs, and wait for its end. Idempotent."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
