"""The processes of the demo: started together, ended together, and none left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from commplane_cache.demo.job import Job

__all__ = ["Ended", "Ranks"]


@dataclass(frozen=True)
class Ended:
    """How the process of one rank ended.

    Attributes:
        returncode: of the process; negative for a signal, None if it was still running at the deadline and was killed.
        said: what it wrote as its result: ``{"passes": [...]}`` or ``{"error": class, "message": text, "missing": ranks}``.
        log: its standard output and error.
    """

    rank: int
    returncode: int | None
    said: dict[str, Any]
    log: str

    def line(self) -> str:
        """In one line, for a person."""
        if self.returncode is None:
            return f"rank {self.rank} was still running at the deadline and was killed"
        if "error" in self.said:
            return f"rank {self.rank}: {self.said['error']}: {self.said['message']}"
        if self.returncode < 0:
            return f"rank {self.rank} was killed by signal {-self.returncode}"
        return f"rank {self.rank} ended with exit code {self.returncode}"


class Ranks:
    """One process a rank, running ``commplane_cache.demo.rank``; they meet on a store of this process.

    A context manager that kills what still runs. If this process is killed itself, the kernel ends the ranks with it.

    Attributes:
        processes: by rank.
    """

    def __init__(
        self, jobs: Sequence[Job], folder: Path, *, env: Mapping[str, str] | None = None, progress: bool = False
    ) -> None:
        """Start them.

        Args:
            jobs: what each rank does; its place among the ranks is filled in here.
            folder: for their configurations, results and logs; is made.
            env: variables to set beside this process's.
            progress: rank 0 writes how far it is to this process's standard error.
        """
        from torch.distributed import TCPStore

        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, job in enumerate(jobs):
                out, config = folder / f"{rank}.json", folder / f"{rank}.job.json"
                out.unlink(missing_ok=True)
                loud = progress and rank == 0
                replace(
                    job,
                    rank=rank,
                    world_size=len(jobs),
                    port=self._store.port,
                    parent=os.getpid(),
                    out=str(out),
                    progress=loud,
                ).write(config)
                with open(folder / f"{rank}.log", "wb") as log:
                    self.processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "commplane_cache.demo.rank", str(config)],
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **(env or {})},
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=None if loud else log,
                            start_new_session=True,  # Ctrl-C is this process's business
                        )
                    )
        except BaseException:
            self.kill()
            raise

    def wait(self, timeout: float, *, grace: float = 20.0) -> list[Ended]:
        """How each rank ended.

        Args:
            timeout: seconds that all of it may take; who still runs then is killed.
            grace: seconds that the others may go on once a rank has failed; their own deadlines should end them before.
        """
        deadline = time.monotonic() + timeout
        failed = False
        while time.monotonic() < deadline:
            codes = [p.poll() for p in self.processes]
            if all(code is not None for code in codes):
                break
            if not failed and any(codes):
                failed, deadline = True, min(deadline, time.monotonic() + grace)
            time.sleep(0.02)
        late = [p.poll() is None for p in self.processes]
        self.kill()
        return [
            Ended(rank, None if late[rank] else p.returncode, self._said(rank), self._log(rank))
            for rank, p in enumerate(self.processes)
        ]

    def kill(self) -> None:
        """Kill what still runs, and wait for its end. Idempotent."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()

    def _said(self, rank: int) -> dict[str, Any]:
        path = self._folder / f"{rank}.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def _log(self, rank: int) -> str:
        return (self._folder / f"{rank}.log").read_text(errors="replace")

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()
