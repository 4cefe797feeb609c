# SPDX-License-Identifier: Apache-2.0
"""The ranks of one candidate of field.py, seen from the driver: started, asked together, and ended without a trace."""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from field_candidates import Candidate, Setup

__all__ = ["Group", "GroupFailed", "close_all"]

_START_S = 900.0  # the kernels of two candidates are compiled the first time
_STEP_S = 300.0
_END_S = 20.0
_MESSAGE_BYTES = 1 << 16


class GroupFailed(Exception):
    """A rank has failed, ended or not answered in time; the text says which and what it said last."""


class Group:
    """The processes of one candidate, which stay until `close`. The constructor returns when all ranks are ready.

    Attributes:
        candidate: which one.
        about: what rank 0 said of its library.
        pids: of the ranks, in their order.

    Raises:
        GroupFailed: the ranks cannot be started.
    """

    def __init__(self, candidate: Candidate, setup: Setup, max_bytes: int) -> None:
        from torch.distributed import TCPStore

        self.candidate, self.about = candidate, dict[str, Any]()
        self._token = f"commplane-field-{secrets.token_hex(6)}"
        self._folder = tempfile.TemporaryDirectory(prefix="field-")
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._names: set[Path] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[socket.socket] = []
        self.pids: list[int] = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
                server.bind(f"{self._folder.name}/ranks")
                server.listen(setup.ranks)
                self._start(setup, max_bytes)
                self._meet(server, setup.ranks)
        except BaseException:
            self.close(force=True)
            raise

    def _start(self, setup: Setup, max_bytes: int) -> None:
        program = Path(__file__).with_name("field_rank.py")
        rank = [sys.executable, str(program), self.candidate.library]
        rank += ["--socket", f"{self._folder.name}/ranks", "--max-bytes", str(max_bytes)]
        environment = {
            **os.environ,
            # One thread a rank: a rank has one core. What names shared memory by address gets a name that we can find again.
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": self._token,
            "MASTER_PORT": str(self._store.port),
            "FIELD_RANKS": str(setup.ranks),
            **self.candidate.environment,
            **self.candidate.settings,
        }
        ours = [{"FIELD_RANK": str(number)} for number in range(setup.ranks)]
        with open(f"{self._folder.name}/log", "wb") as log:
            for extra in [{}] if self.candidate.launcher else ours:
                self._processes.append(
                    subprocess.Popen(
                        [*self.candidate.launcher, *rank],
                        env={**environment, **extra},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def _meet(self, server: socket.socket, ranks: int) -> None:
        """Wait until every rank has connected, and is ready."""
        deadline = time.monotonic() + _START_S
        while len(self._channels) < ranks:
            if not select.select([server], [], [], 0.5)[0]:
                self._check_processes()
                if time.monotonic() > deadline:
                    raise GroupFailed(f"{ranks - len(self._channels)} of {ranks} ranks did not start in {_START_S:.0f} s")
                continue
            self._channels.append(server.accept()[0])
            self.pids.append(self._receive(self._channels[-1])["pid"])
        ready = self._collect(_START_S)
        order = sorted(range(ranks), key=lambda i: ready[i]["rank"])
        self._channels, self.pids = [self._channels[i] for i in order], [self.pids[i] for i in order]
        self.about = ready[order[0]]["about"]
        self._names = {name for pid in self.pids for name in _shared_names(pid)}

    def ask(self, **request: Any) -> list[dict[str, Any]]:
        """Send one request to every rank; the answers in the order of ranks.

        Raises:
            GroupFailed: a rank has failed.
        """
        for channel in self._channels:
            with suppress(BrokenPipeError):  # reading says more
                channel.send(json.dumps(request).encode())
        return self._collect(_STEP_S)

    def _collect(self, seconds: float) -> list[dict[str, Any]]:
        """One message of each rank, or the failure of the first that has one."""
        answers: dict[socket.socket, dict[str, Any]] = {}
        deadline = time.monotonic() + seconds
        while len(answers) < len(self._channels):
            waiting = [c for c in self._channels if c not in answers]
            readable = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not readable:
                late = [i for i, c in enumerate(self._channels) if c in waiting]
                raise GroupFailed(f"ranks {late} did not answer in {seconds:.0f} s{self._last_words()}")
            for channel in readable:
                answers[channel] = self._receive(channel)
        return [answers[channel] for channel in self._channels]

    def _receive(self, channel: socket.socket) -> dict[str, Any]:
        try:
            received = channel.recv(_MESSAGE_BYTES)
        except ConnectionResetError:
            received = b""
        if not received:
            raise GroupFailed(f"a rank has ended{self._last_words()}")
        message: dict[str, Any] = json.loads(received)
        if "error" in message:
            raise GroupFailed(message["error"])
        return message

    def _check_processes(self) -> None:
        for process in self._processes:
            if process.poll() is not None:
                raise GroupFailed(f"ended with {process.returncode} before its ranks were ready{self._last_words()}")

    def _last_words(self) -> str:
        """The last lines that the ranks have written, whatever they are."""
        lines = Path(f"{self._folder.name}/log").read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip()][-3:]
        return f"; it said: {' / '.join(said)}" if said else ""

    def dismiss(self) -> None:
        """Tell the ranks to go, and do not wait for it."""
        for channel in self._channels:
            channel.close()

    def close(self, *, force: bool = False) -> None:
        """End the ranks, with `force` at once, and remove what they leave in shared memory and on disk."""
        self.dismiss()
        deadline = time.monotonic() + (0.0 if force else _END_S)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._end(signal.SIGTERM)  # a launcher ends its ranks when it gets this
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
        self._end(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._sweep()
        self._folder.cleanup()

    def _end(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, number)
        if number is signal.SIGKILL:
            for pid in self.pids:  # those that a launcher started have groups of their own
                with suppress(ProcessLookupError, FileNotFoundError):
                    if self._folder.name in Path(f"/proc/{pid}/cmdline").read_text():
                        os.kill(pid, number)

    def _sweep(self) -> None:
        """Remove what the ranks have left in shared memory: two libraries always do, others when a rank is killed."""
        for path in {*self._names, *Path("/dev/shm").glob(f"*{self._token}*")}:
            path.unlink(missing_ok=True)


def _shared_names(pid: int) -> list[Path]:
    """The names in shared memory that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [Path(name) for name in (line[line.find("/") :] for line in lines if " /dev/shm/" in line) if "(deleted)" not in name]


def close_all(groups: Sequence[Group]) -> None:
    """Close every group; they end side by side."""
    for group in groups:
        group.dismiss()
    for group in groups:
        group.close()
