"""Ranks as processes, forked from one that has torch and commplane imported: a rank costs milliseconds, and can be killed.

`Ranks` forks them from this process, which must have no other thread. `Server` does so in a process of its own, for pytest, whose
process has threads. The store is a TCPStore in a process that nobody kills, as under torchrun.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from commplane.testing import Outcome

_PR_SET_PDEATHSIG = 1


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _fork(body: Callable[[], int]) -> int:
    """The id of a process that runs `body`, exits with what it returns, and is killed when this one ends."""
    if _threads() != 1:
        raise RuntimeError(f"wanted a process with one thread to fork ranks from, found {_threads()}")
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            status = body()
    except BaseException:  # nothing may come back into the parent's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _host_store(write: int) -> int:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(write, str(store.port).encode())
    signal.pause()
    return 0


class Ranks:
    """`function(store, rank, world_size, *args)` in as many processes. Its result must be JSON.

    Args:
        world_size: number of ranks.
        function: what each of them does.
        args: for it.
        folder: for their output.
        env: variables to set in all of them.
    """

    def __init__(
        self, world_size: int, function: Callable[..., Any], args: Sequence[Any], folder: Path, env: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._codes: dict[int, int] = {}
        read, write = os.pipe()
        self._host = _fork(lambda: _host_store(write))
        os.close(write)
        port = int(os.read(read, 16) or b"0")
        os.close(read)
        if not port:
            raise RuntimeError("the process of the store ended")

        def run(rank: int) -> int:
            log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.enable()
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            os.environ.update(env)
            from torch.distributed import TCPStore

            said: dict[str, Any] = {}
            try:
                said["result"] = function(TCPStore("127.0.0.1", port, is_master=False), rank, world_size, *args)
            except Exception as error:  # reported to the caller, who looks at it
                traceback.print_exc()
                said = {"error": type(error).__name__, "message": str(error)}
            part = folder / f"{rank}.part"
            part.write_text(json.dumps(said))
            part.rename(folder / f"{rank}.json")
            return 1 if "error" in said else 0

        self.pids = [_fork(lambda rank=rank: run(rank)) for rank in range(world_size)]  # type: ignore[misc]

    def running(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self._codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self._codes]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank, unless it has ended."""
        if rank in self.running():  # its number cannot be another process's: it is ours to wait for
            os.kill(self.pids[rank], number)

    def end(self, seconds: float) -> list[Outcome]:
        """Wait for all of them; who is still running then shows its stacks, is killed and has no exit status."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.002)
        late = self.running()
        for rank in late:
            self.kill(rank, signal.SIGUSR2)
        if late:
            time.sleep(0.5)
        for rank in late:
            self.kill(rank)
        for rank in late:
            if rank not in self._codes:
                os.waitpid(self.pids[rank], 0)
                self._codes[rank] = -signal.SIGKILL
        os.kill(self._host, signal.SIGKILL)
        os.waitpid(self._host, 0)
        return [self._outcome(rank, rank in late) for rank in range(len(self.pids))]

    def _outcome(self, rank: int, late: bool) -> Outcome:
        answer, log = self._folder / f"{rank}.json", self._folder / f"{rank}.log"
        said = json.loads(answer.read_text()) if answer.exists() else {}
        output = log.read_text(errors="replace") if log.exists() else ""
        code = None if late else self._codes[rank]
        return Outcome(rank, code, said.get("result"), said.get("error"), said.get("message", ""), output)


class Server:
    """A process that forks ranks for this one. `run` is `commplane.testing.run_processes` without the wait for imports.

    Args:
        prefix: a command to run it under.
    """

    def __init__(self, prefix: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
    ) -> list[Outcome]:
        """Call a function of a module in `world_size` new processes: how each of them ended.

        Args:
            world_size: number of ranks.
            function: a module-level function; its file is loaded by path.
            args: JSON values.
            timeout: seconds until those still running are killed.
            env: variables to set in all ranks.
        """
        file = sys.modules[function.__module__].__file__
        flight = {key: value for key, value in os.environ.items() if key.startswith("COMMPLANE_")}
        job = {"file": file, "function": function.__name__, "world_size": world_size, "args": args, "timeout": timeout}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "env": {**flight, **(env or {})}}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks ranks has ended with {self._process.wait()}")
        return [Outcome(**outcome) for outcome in json.loads(answer)]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _module(file: str, loaded: dict[str, ModuleType]) -> ModuleType:
    if file not in loaded:
        spec = importlib.util.spec_from_file_location(f"ranks_of_{Path(file).stem}", file)
        assert spec is not None and spec.loader is not None
        loaded[file] = module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return loaded[file]


def _serve() -> None:
    for module in ("torch.distributed", "commplane.runtime", "commplane_custom_ar.backend"):
        importlib.import_module(module)  # what a rank needs is imported before it is forked
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed belongs to nobody's answer
    loaded: dict[str, ModuleType] = {}
    for line in sys.stdin:
        job = json.loads(line)
        function = getattr(_module(job["file"], loaded), job["function"])
        with tempfile.TemporaryDirectory() as folder:
            outcomes = Ranks(job["world_size"], function, job["args"], Path(folder), job["env"]).end(job["timeout"])
        answers.write(json.dumps([vars(outcome) for outcome in outcomes]) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
