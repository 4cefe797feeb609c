# SPDX-License-Identifier: Apache-2.0
"""Does memory of these GPUs really go from process to process? Tried, not asked for.

What the driver says of P2P is not always so: handles that cannot be opened in this container, copies that hang, bytes that arrive
wrong. So each rank starts a process (`proof_child`) that opens the memory of all others, writes into it with a kernel, and
compares what the others wrote and what it reads from them; twice, so that a stale copy shows. A process that does not answer in
time is killed with all that it started, and that is the finding: nothing of the rank itself hangs.

Every function here that takes a bootstrap is collective over the group; all ranks come to the same `Proof`.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from commplane.api import Bootstrap, Deadline

__all__ = ["Proof", "Child", "conclude", "prove"]

_WORDS: Final = 16384  # 64 KiB a place: more than one block of a kernel, less than anybody misses
_ROUNDS: Final = 2
# Between two values: no word of one rank's pattern is also a word of another's, of the other round's, or likely what was there.
_STRIDE: Final = 0x00100000
_LAST_WORDS_S: Final = 5.0  # for a killed process to end


@dataclass(frozen=True)
class Proof:
    """What came of it; equal on every rank.

    Attributes:
        failures: one sentence for each thing that is wrong; empty if memory goes everywhere.
        conclusive: False where the processes did not come so far as to say something of the GPUs.
        waited: seconds that the processes had.
        recalled: where it was remembered from, with how to forget it; empty if it was tried just now.
    """

    failures: tuple[str, ...]
    conclusive: bool
    waited: float
    recalled: str = ""

    @property
    def holds(self) -> bool:
        """Memory goes from every rank to every rank."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Proof:
        """Of another rank, or of a file."""
        return cls(tuple(map(str, data["failures"])), bool(data["conclusive"]), float(data["waited"]), str(data["recalled"]))


class Child:
    """The process of one rank. Local.

    Its answers are what `conclude` reads: ``{"answer": ...}``, ``{"failed": reason}`` or, from here, ``{"silent": peer or None}``
    and ``{"ended": how, "at": peer or None}``.

    Args:
        job: what `proof_child` wants to know.
        deadline: for all of its answers together.
        environ: of the process.
    """

    def __init__(self, job: Mapping[str, Any], deadline: Deadline, environ: Mapping[str, str]) -> None:
        if not sys.executable:
            raise FileNotFoundError("sys.executable names no Python")
        self._deadline = deadline
        self._at: int | None = None
        self._rest = b""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        self._link, theirs = socket.socketpair()
        try:
            # The modules come from where they came from here, also where sys.path was changed by hand. With "-m" the present
            # folder would come first, and files in it could be taken for modules.
            path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path if entry)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "commplane_custom_ar.gpu.proof_child", str(theirs.fileno()), json.dumps(job)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={**environ, "PYTHONPATH": path},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self._link.close()
            self._log.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, do: str, *arguments: Any) -> dict[str, Any]:
        """Have something done, and wait for the answer."""
        try:
            self._link.settimeout(max(self._deadline.remaining(), 0.001))
            self._link.sendall((json.dumps({"do": do, "with": arguments}) + "\n").encode())
        except OSError:  # it is gone, or does not listen: the answer says which
            return self.answer()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer; the first one comes by itself when the process is up."""
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                said: dict[str, Any] = json.loads(line)
                if "at" not in said:
                    self._at = None
                    return said
                self._at = said["at"]
                continue
            remaining = self._deadline.remaining()
            if remaining == 0.0:
                return {"silent": self._at}
            self._link.settimeout(remaining)
            try:
                more = self._link.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                more = b""
            if not more:
                return {"ended": self._end(), "at": self._at}
            self._rest += more

    def _end(self) -> str:
        """How a process that closed its socket ended, with the last line that it printed."""
        try:
            code = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"{how}: {last}" if last else how

    def close(self) -> None:
        """End the process, with whatever it started, if it has not ended by itself."""
        self._link.close()
        try:
            if self._process.poll() is None:
                try:
                    # A client of MPS that is killed may upset the server: one that can end by itself is let.
                    self._process.wait(min(_LAST_WORDS_S, self._deadline.remaining()))
                except subprocess.TimeoutExpired:
                    # Its own session: nobody else's processes are in this group.
                    os.killpg(self._process.pid, signal.SIGKILL)
                    # One that hangs in the driver may not be killed at once, or ever; it is nobody's business here then.
                    self._process.wait(_LAST_WORDS_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            return
        finally:
            self._log.close()


def prove(
    bootstrap: Bootstrap,
    uuids: Sequence[str],
    *,
    ordinal: int,
    library: str,
    seconds: float,
    environ: Mapping[str, str] = os.environ,
    start: Callable[[Mapping[str, Any], Deadline, Mapping[str, str]], Child] = Child,
) -> Proof:
    """Try it. Collective; the same `Proof` on every rank.

    Args:
        bootstrap: of the group.
        uuids: the GPU of each rank, in group order.
        ordinal: of this rank's GPU in this process, and in its child.
        library: path of the native library.
        seconds: that this rank's process may take for everything. Less than a round of the bootstrap may take, or the other
            ranks' patience ends before this rank can say that its process hangs.
        environ: of the process; ``CUDA_VISIBLE_DEVICES`` is passed on as it is.
        start: makes the process.
    """
    rank, size = bootstrap.rank, bootstrap.world_size
    job = {"rank": rank, "world_size": size, "words": _WORDS, "ordinal": ordinal, "uuid": uuids[rank], "library": library}
    child: Child | None = None

    def together(step: str, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        return bootstrap.all_gather(dict(said), what=f"P2P proof: {step}")

    try:
        try:
            child = start(job, Deadline(seconds), environ)
            said = child.answer()
            if "answer" in said:
                said = child.ask("allocate")
        except OSError as error:
            said = {"failed": f"its child process does not start: {error}"}
        seed = secrets.randbits(32)
        started = together("start", {**said, "seed": seed})
        proof = conclude("start", started, uuids, bootstrap.ranks, seconds)
        if proof is not None or child is None:
            assert proof is not None  # a rank without a child has said so
            return proof
        steps: list[tuple[str, Sequence[Any]]] = [("open", [[said["answer"]["handle"] for said in started]])]
        for turn in range(_ROUNDS):
            values = [(started[0]["seed"] + (turn * size + writer) * _STRIDE) % (1 << 32) for writer in range(size)]
            steps += [("write", [values[rank]]), ("verify", [values])]
        steps += [("close", []), ("free", [])]
        for step, arguments in steps:
            proof = conclude(step, together(step, child.ask(step, *arguments)), uuids, bootstrap.ranks, seconds)
            if proof is not None:
                return proof
        return Proof((), True, seconds)
    finally:
        if child is not None:
            child.close()


def conclude(
    step: str, answers: Sequence[Mapping[str, Any]], uuids: Sequence[str], ranks: Sequence[int], seconds: float
) -> Proof | None:
    """What the answers of all processes to one step mean; None if all is well so far. Pure.

    Args:
        step: what they were asked.
        answers: in group order, as `Child` gives them.
        uuids: GPUs, in group order.
        ranks: global ranks, in group order.
        seconds: that each process had.
    """
    failures: list[str] = []

    def pair(one: int, other: int) -> str:
        if uuids[one] == uuids[other]:
            return f"P2P between ranks {ranks[one]} and {ranks[other]} on GPU {uuids[one]}"
        return f"P2P between GPU {uuids[one]} (rank {ranks[one]}) and GPU {uuids[other]} (rank {ranks[other]})"

    conclusive = step != "start"
    for i, said in enumerate(answers):
        peer = said.get("silent", said.get("at"))
        # A rank's own memory is the first that it touches in a step; what happens there is not between two GPUs.
        where = f"the child process of rank {ranks[i]} (GPU {uuids[i]})" if peer is None or peer == i else pair(i, peer)
        if "silent" in said:
            failures.append(f"{where} hangs: no answer to {step!r} within {seconds:.3g} s")
        elif "ended" in said:
            failures.append(f"{where} fails: the process {said['ended']} in {step!r}")
        elif "failed" in said:
            failures.append(f"rank {ranks[i]} (GPU {uuids[i]}) fails in {step!r}: {said['failed']}")
        else:
            answer = said["answer"]
            failures += [f"{pair(i, int(p))} fails: {text}" for p, text in answer.get("refused", {}).items()]
            for way, word in (("written", "writes"), ("read", "reads")):
                failures += [
                    f"{pair(i, int(p))} gives wrong data: {count} of {_WORDS} words of rank {ranks[int(p)]} are wrong on rank "
                    f"{ranks[i]} ({word})"
                    for p, count in answer.get(way, {}).items()
                ]
    return Proof(tuple(failures), conclusive, seconds) if failures else None
