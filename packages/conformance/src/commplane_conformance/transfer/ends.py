"""Ends as processes, from the test's side: calls with deadlines, signals, and what an end wrote before it failed."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commplane_conformance.provider import EngineSubject
from commplane_conformance.transfer.end import main

__all__ = ["CALL_SECONDS", "FAULT_SECONDS", "Ends", "Remote"]

CALL_SECONDS = 60.0
"""How long one call may take, of an engine that is given 30 s for a wait of its own."""
FAULT_SECONDS = 3.0
"""The timeout that engines are opened with where a peer is going to be dead or stopped."""

_numbers = itertools.count(1)


class Remote:
    """One end, in a process of its own. What it raises is raised here.

    Attributes:
        name: of its context, when it has an engine.
        is_fit: whether another test may go on with the process.
        made: its metadata, once it has a pool.
    """

    def __init__(self, subject: EngineSubject, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([main.__module__])
        self.name = ""
        self.is_fit = True
        self.made = b""
        self._subject = subject
        self._log = log
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, subject.spec.factory, str(log)), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of its process."""
        assert self._process.pid is not None
        return self._process.pid

    def post(self, method: str, *arguments: Any) -> None:
        """Begin a call; `answer` has its result."""
        self._pipe.send((method, arguments))

    def answer(self, seconds: float = CALL_SECONDS) -> Any:
        """The result of the call that was posted."""
        if not self._pipe.poll(seconds):
            self.is_fit = False
            raise AssertionError(f"{self.name} did not come back within {seconds:g} s{self.wrote()}")
        try:
            ok, value = self._pipe.recv()
        except EOFError:
            self._process.join(CALL_SECONDS)
            raise AssertionError(f"the process of {self.name} ended with {self._process.exitcode}{self.wrote()}") from None
        if not ok:
            raise value
        return value

    def do(self, method: str, *arguments: Any, seconds: float = CALL_SECONDS) -> Any:
        """A method of `End`, called over there."""
        self.post(method, *arguments)
        return self.answer(seconds)

    def wrote(self) -> str:
        """The end of what it printed, for the text of a failure."""
        with contextlib.suppress(OSError):
            text = self._log.read_text(errors="replace").strip()[-1500:]
            return f"; it wrote:\n{text}" if text else ""
        return ""

    def open(self, timeout: float, options: Mapping[str, Any] | None = None, host: str = "127.0.0.1") -> None:
        """A new engine over there."""
        self.do("open", self.name, {**self._subject.options, **(options or {})}, timeout, host)

    def take_pool(self, nbytes: int, own: bool = False) -> None:
        """Memory for it."""
        self.made = self.do("take_pool", nbytes, own)

    def connect(self, *peers: Remote) -> None:
        """To each of them."""
        for peer in peers:
            self.do("connect", peer.name, peer.made)

    def kill(self) -> None:
        """As an operator does, with -9; waits until it is gone."""
        self.is_fit = False
        os.kill(self.pid, signal.SIGKILL)
        self._process.join(CALL_SECONDS)

    def stop(self) -> None:
        """Until `go`."""
        self.is_fit = False
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + CALL_SECONDS
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline, f"{self.name} could not be stopped"
            time.sleep(0.001)

    def go(self) -> None:
        """Continue."""
        os.kill(self.pid, signal.SIGCONT)

    def memory(self, address: int, nbytes: int) -> bytes:
        """Of its process, also while that is stopped."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as file:
            file.seek(address)
            return file.read(nbytes)

    def end(self) -> None:
        """Let the process go, by force if it is stopped."""
        if self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._process.join(CALL_SECONDS)
        self._pipe.close()


class Ends:
    """Makes ends. Processes are kept from one test to the next, since loading an engine's library may take seconds."""

    def __init__(self, subject: EngineSubject) -> None:
        self.subject = subject
        self._folder = tempfile.TemporaryDirectory(prefix="commplane-conformance-")
        self._idle: list[Remote] = []
        self._used: list[Remote] = []

    def process(self, name: str | None = None) -> Remote:
        """A process without an engine."""
        number = next(_numbers)
        remote = self._idle.pop() if self._idle else Remote(self.subject, Path(self._folder.name) / f"end-{number}.log")
        remote.name = name or f"end-{number}"
        self._used.append(remote)
        return remote

    def get(self, nbytes: int = 1 << 20, *, timeout: float = 30.0, own: bool = False, name: str | None = None) -> Remote:
        """An end with an engine and a pool."""
        remote = self.process(name)
        remote.open(timeout)
        remote.take_pool(nbytes, own)
        return remote

    def pair(self, nbytes: int = 1 << 20, *, timeout: float = 30.0) -> tuple[Remote, Remote]:
        """A writer with random bytes in its pool, connected to a reader with zeros."""
        writer, reader = self.get(nbytes, timeout=timeout), self.get(nbytes, timeout=timeout)
        writer.do("fill", next(_numbers))
        writer.connect(reader)
        return writer, reader

    def clear(self, keep: bool) -> None:
        """After a test: close all engines. A process goes on only if `keep`, and if nothing was done to it."""
        used, self._used = self._used, []
        for remote in used:
            if keep and remote.is_fit:
                remote.post("forget")
        for remote in used:
            if keep and remote.is_fit:
                remote.answer()
                self._idle.append(remote)
            else:
                remote.end()

    def close(self) -> None:
        """End every process."""
        for remote in [*self._idle, *self._used]:
            remote.end()
        self._folder.cleanup()
