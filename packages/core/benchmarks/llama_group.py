"""The ranks of one way to run a model, as the bench sees them: started by torchrun, asked over a socket, ended with the bench."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

__all__ = ["Group"]

START_S = 240.0
"""Until all ranks have come; they import transformers first."""
ANSWER_S = 600.0
"""Until all have answered."""


class Group:
    """`ranks` processes under torchrun.

    Args:
        way: what a rank gives to ``init_process_group``, or ``whole`` for a model that is not split.
        ranks: how many.
        threads: of each, for torch's operators.
    """

    def __init__(self, way: str, ranks: int, threads: int) -> None:
        self.way = way
        key = secrets.token_bytes(16)
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  closed with the group
        self.ends: list[Connection] = []
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            script = str(Path(__file__).with_name("llama_rank.py"))
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", script, way]
            env = {"BENCH_ADDRESS": str(listener.address[1]), "BENCH_KEY": key.hex(), "OMP_NUM_THREADS": str(threads)}
            quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
            self.launcher = subprocess.Popen(
                [*launch], env={**os.environ, **quiet, **env}, stdout=self.output, stderr=self.output
            )
            # A listener has no deadline of its own, and neither has accept.
            listener._listener._socket.settimeout(START_S)  # type: ignore[attr-defined]
            arrived: dict[int, Connection] = {}
            while len(arrived) < ranks:
                try:
                    end = listener.accept()
                except OSError as error:
                    raise self._failed(f"{len(arrived)} of {ranks} ranks came within {START_S:g} s") from error
                arrived[end.recv()] = end
        self.ends = [arrived[rank] for rank in range(ranks)]

    def ask(self, **request: Any) -> list[Any]:
        """Send to all ranks at once: their answers, by rank."""
        for end in self.ends:
            end.send(request)
        answers: dict[int, Any] = {}
        while len(answers) < len(self.ends):
            open_: dict[Any, int] = {end: rank for rank, end in enumerate(self.ends) if rank not in answers}
            ready: list[Any] = wait(list(open_), ANSWER_S)
            if not ready:
                raise self._failed(f"ranks {sorted(open_.values())} did not answer {request['do']!r} within {ANSWER_S:g} s")
            for end in ready:
                try:
                    answers[open_[end]] = end.recv()
                except EOFError as error:
                    raise self._failed(f"rank {open_[end]} ended in {request['do']!r}") from error
        return [answers[rank] for rank in range(len(self.ends))]

    def _failed(self, what: str) -> RuntimeError:
        self._end()
        self.output.seek(0)
        return RuntimeError(f"{self.way}: {what}\n{self.output.read().decode(errors='replace')[-4000:]}")

    def close(self) -> None:
        """End the processes: a rank whose socket is closed leaves. Idempotent."""
        self._end()
        self.output.close()

    def _end(self) -> None:
        for end in self.ends:
            end.close()
        try:
            self.launcher.wait(30)
        except subprocess.TimeoutExpired:
            self.launcher.terminate()  # on which torchrun ends its ranks
            self.launcher.wait(60)
