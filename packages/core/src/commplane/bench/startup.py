"""What starting up costs when there are many ranks: `commplane.init` and a communicator, over a real TCPStore.

Ranks are virtual: threads of a few processes on this machine, each with its own client of the store and its own plane, that run
the code of real ranks over a backend that costs nothing to build. What is measured is therefore the control plane. They share the
cores of this machine, so times are those of that much work on these cores; ranks on cores of their own wait for the store alone.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from commplane.errors import CommplaneError, ConfigError

__all__ = ["STEPS", "StartupRow", "growth", "measure_startup"]

STEPS = ("round", "gather", "agree", "init", "communicator")
"""What is measured, in the order of the rows."""

_HOST = "127.0.0.1"
# Ranks of one process share an interpreter lock: more of them than this wait for it more than they work.
_RANKS_A_PROCESS = 128
_PROCESSES = 2
# torch looks up the name of each client that connects, and warns if there is none; a resolver that drops a question of so many
# holds up nothing that is measured, but for its own patience.
_ENVIRONMENT = {"RES_OPTIONS": "timeout:1 attempts:1", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
# Descriptors that a process has open beside the connections of its ranks.
_SPARE_FILES = 256


@dataclass(frozen=True)
class StartupRow:
    """One step at one number of ranks. Counts are those of one run of the step, by all ranks together.

    Attributes:
        step: ``round`` (all ranks say the same), ``gather`` (each says something else, of 64 bytes), ``agree`` (the first step
            of a communicator: verdicts are published, what to build is decided), ``init`` or ``communicator``.
        ranks: how many.
        processes: that they were spread over.
        seconds: median over the runs, from the first rank that begins to the last that is done.
        low: of the fastest run.
        high: of the slowest run.
        cpu_seconds: median over the runs, of all ranks and the store together.
        runs: how many were counted.
        rounds: of the control plane, in one run.
        messages: calls of the store.
        per_rank_and_round: messages, divided by ranks and rounds.
        sent: bytes of keys and values that the ranks sent.
        received: bytes of values that the ranks were sent.
        store_alone: seconds that the same calls take when all ranks make them at once and wait for nothing but the store.
    """

    step: str
    ranks: int
    processes: int
    seconds: float
    low: float
    high: float
    cpu_seconds: float
    runs: int
    rounds: int
    messages: int
    per_rank_and_round: float
    sent: int
    received: int
    store_alone: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object with these names."""
        return asdict(self)


def measure_startup(ranks: Sequence[int], *, runs: int, progress: Callable[[str], None] = lambda _text: None) -> list[StartupRow]:
    """The rows of each number of ranks. Local: the ranks are started here, on this machine.

    Raises:
        ConfigError: this process may not open as many files as there are ranks.
        CommplaneError: a rank failed.
    """
    _allow_files(max(ranks) + _SPARE_FILES)
    rows = []
    with _processes(1 + max(map(_spread, ranks))) as (server, *processes):
        for count in ranks:
            rows += _measure(server, processes[: _spread(count)], count, runs, progress)
    return rows


def _spread(ranks: int) -> int:
    """How many processes the ranks are spread over."""
    return min(ranks, max(_PROCESSES, math.ceil(ranks / _RANKS_A_PROCESS)))


def growth(rows: Sequence[StartupRow], step: str) -> float | None:
    """By what power of the ranks the seconds of `step` grow: slope of the logarithms, least squares. None for one size. Pure."""
    points = [(math.log(r.ranks), math.log(r.seconds)) for r in rows if r.step == step]
    if len({x for x, _ in points}) < 2:
        return None
    slope, _ = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    return slope


def _allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ConfigError(
                f"bench: --startup wants {wanted} open files for its ranks, found a limit of {hard}: raise ulimit -n"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _processes(count: int) -> Iterator[list[_Process]]:
    started: list[_Process] = []
    try:
        for _ in range(count):
            started.append(_Process())
        yield started
    finally:
        for process in started:
            process.end()


class _Process:
    """One process of virtual ranks; see `commplane.bench.virtual`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "commplane.bench.virtual"]
        self._popen = subprocess.Popen(
            command, env=_ENVIRONMENT | os.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def order(self, **order: Any) -> None:
        """Say what to do. Does not wait."""
        assert self._popen.stdin is not None
        try:
            print(json.dumps(order), file=self._popen.stdin, flush=True)
        except BrokenPipeError as error:
            raise CommplaneError("bench: a process of virtual ranks has ended before its time, see standard error") from error

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far, in steps of a hundredth."""
        fields = Path(f"/proc/{self._popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def answer(self) -> dict[str, Any]:
        """Wait until it is done."""
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        if not line:
            raise CommplaneError("bench: a process of virtual ranks has ended before its time, see standard error")
        return dict(json.loads(line))

    def end(self) -> None:
        """Stop it, whatever it does."""
        self._popen.kill()
        self._popen.communicate()


@dataclass
class _Run:
    """One step, done once by all ranks."""

    seconds: float
    cpu_seconds: float
    rounds: int
    calls: dict[str, dict[str, int]]
    said: set[str]

    def total(self, what: str) -> int:
        """Over all kinds of calls."""
        return sum(c[what] for c in self.calls.values())


def _do(server: _Process, processes: Sequence[_Process], step: str, *arguments: Any) -> _Run:
    before = sum(process.cpu_seconds() for process in (server, *processes))
    for process in processes:
        process.order(step=step, arguments=arguments)
    answers = [process.answer() for process in processes]
    spent = sum(process.cpu_seconds() for process in (server, *processes)) - before
    failed = next((a["failed"] for a in answers if a["failed"] is not None), None)
    if failed is not None:
        raise CommplaneError(f"bench: {step} failed on a virtual rank: {failed}")
    calls: dict[str, dict[str, int]] = {}
    for answer in answers:
        for kind, counts in answer["calls"].items():
            mine = calls.setdefault(kind, dict.fromkeys(counts, 0))
            for name, number in counts.items():
                mine[name] += number
    seconds = max(a["ended"] for a in answers) - min(a["began"] for a in answers)
    return _Run(seconds, spent, sum(a["rounds"] for a in answers), calls, {text for a in answers for text in a["said"]})


def _measure(
    server: _Process, processes: Sequence[_Process], ranks: int, runs: int, progress: Callable[[str], None]
) -> list[StartupRow]:
    """Every step at one number of ranks, in turns, over a store of its own."""
    progress(f"{ranks} ranks connect")
    server.order(serve=_HOST)
    port = server.answer()["port"]
    for i, process in enumerate(processes):
        process.order(host=_HOST, port=port, ranks=list(range(i, ranks, len(processes))), world_size=ranks)
    for process in processes:
        process.answer()
    found: dict[str, list[_Run]] = {}
    for number in range(runs + 1):  # the first is not counted: imports, first use of each connection
        progress(f"{ranks} ranks, run {number} of {runs}")
        for step in ("init", "communicator", "release", "agree", "round", "gather", "close"):
            run = _do(server, processes, step)
            if len(run.said) != 1:
                raise CommplaneError(f"bench: {step} ended differently on virtual ranks: {sorted(run.said)}")
            if number:
                found.setdefault(step, []).append(run)
    rows = [_row(server, processes, step, ranks, found[step]) for step in STEPS]
    for process in processes:
        process.order(step="end")
    for process in processes:
        process.answer()
    return rows


def _row(server: _Process, processes: Sequence[_Process], step: str, ranks: int, runs: Sequence[_Run]) -> StartupRow:
    """One row, and what the store alone takes for the calls of a run."""
    calls = {kind: list(counts.values()) for kind, counts in runs[-1].calls.items()}
    _do(server, processes, "replay_ready", calls)
    alone = statistics.median(_do(server, processes, "replay", calls).seconds for _ in runs)
    seconds = [run.seconds for run in runs]
    rounds = runs[-1].rounds
    messages = statistics.median(run.total("calls") for run in runs)
    return StartupRow(
        step=step,
        ranks=ranks,
        processes=len(processes),
        seconds=round(statistics.median(seconds), 6),
        low=round(min(seconds), 6),
        high=round(max(seconds), 6),
        cpu_seconds=round(statistics.median(run.cpu_seconds for run in runs), 2),
        runs=len(runs),
        rounds=rounds,
        messages=round(messages),
        per_rank_and_round=round(messages / ranks / rounds, 3),
        sent=round(statistics.median(run.total("sent") for run in runs)),
        received=round(statistics.median(run.total("received") for run in runs)),
        store_alone=round(alone, 6),
    )
