"""``commplane-disagg bench engines``: all engines beside memcpy, a plain socket and the bare libraries, in one run.

Every case has processes of its own, all of them stopped but the two that are being timed, and the cases take turns: what else the
machine does falls on all of them alike. Compare ratios, which are medians of the ratios of single rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import signal
import statistics
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from commplane.errors import CommplaneError
from commplane_disagg.bench.engine_cases import CASES, end_main

__all__ = ["add_arguments", "run", "table"]

_START_SECONDS = 120.0
_ROUND_SECONDS = 120.0
_PAGES = (2 << 20, 64 << 10)
_TARGETS = (
    ("shm", "memcpy", 0.85),
    ("tcp", "plain socket", 1.3),
    ("tcp", "bare mooncake", 1.0),
    ("tcp", "bare nixl over tcp", 1.0),
    ("nixl", "bare nixl", 0.9),
    ("nixl", "bare nixl, spinning", 0.9),
    ("nixl over tcp", "bare nixl over tcp", 0.9),
    ("mooncake", "bare mooncake", 0.9),
)
"""Case, what it is compared with, and the least ratio of their speeds at pages of 2 MiB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--mib", type=int, default=64, help="size of a pool, of which every transfer moves all (default 64)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that count, after one that does not (default 9)")
    parser.add_argument("--cases", default="", help=f"some of: {'; '.join(CASES)} (default all that can be opened here)")


@dataclass
class _Pair:
    """The processes of one case. `seconds` has those of each round by page size, `latency` those of one page of 2 MiB."""

    name: str
    reader: Any
    writer: Any
    to_reader: Connection
    to_writer: Connection
    seconds: dict[int, list[float]] = field(default_factory=dict)
    latency: list[float] = field(default_factory=list)

    def signal(self, number: int) -> None:
        for process in (self.reader, self.writer):
            os.kill(process.pid, number)

    def time(self, offsets: list[int], page: int, times: int) -> list[float]:
        self.to_writer.send((offsets, page, times))
        return _answer(self.name, self.to_writer, _ROUND_SECONDS)  # type: ignore[no-any-return]


def _answer(name: str, pipe: Connection, seconds: float) -> Any:
    try:
        if pipe.poll(seconds):
            return pipe.recv()
    except EOFError:
        raise CommplaneError(f"a process of case {name!r} ended; what it printed says why") from None
    raise CommplaneError(f"case {name!r} did not answer within {seconds:g} s")


def _start(name: str, nbytes: int) -> _Pair | str:
    """Both ends, connected; or why the case cannot run here."""
    context = multiprocessing.get_context("spawn")
    made: Any = None
    processes, pipes = [], []
    for _ in range(2):
        mine, its = context.Pipe()
        process = context.Process(target=end_main, args=(its, name, nbytes, made), daemon=True)
        process.start()
        its.close()
        processes.append(process)
        pipes.append(mine)
        said, value = _answer(name, mine, _START_SECONDS)
        if said != "ready":
            for started in processes:
                started.kill()
            return str(value)
        made = (value,)
    return _Pair(name, processes[0], processes[1], pipes[0], pipes[1])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure: what the command prints as JSON.

    Raises:
        CommplaneError: an unknown case, or one that failed while it was timed.
    """
    names = [name.strip() for name in arguments.cases.split(";") if name.strip()] or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise CommplaneError(f"bench engines: no case {', '.join(unknown)}; there are {'; '.join(CASES)}")
    nbytes = arguments.mib << 20
    pairs: list[_Pair] = []
    absent: dict[str, str] = {}
    try:
        for name in names:
            found = _start(name, nbytes)
            if isinstance(found, str):
                absent[name] = found
            else:
                pairs.append(found)
                found.signal(signal.SIGSTOP)
        for number in range(arguments.rounds + 1):
            for pair in pairs:
                _round(pair, nbytes, keep=number > 0)
        _check(pairs)
    finally:
        for pair in pairs:
            with contextlib.suppress(ProcessLookupError):
                pair.signal(signal.SIGKILL)
            for process in (pair.reader, pair.writer):
                process.join()
    return _result(pairs, absent, nbytes, arguments.rounds)


def _round(pair: _Pair, nbytes: int, keep: bool) -> None:
    pair.signal(signal.SIGCONT)
    try:
        for page in _PAGES:
            # The first transfer finds caches as the case before left them.
            seconds = pair.time(list(range(0, nbytes, page)), page, 3)[1:]
            if keep:
                pair.seconds.setdefault(page, []).append(min(seconds))
        latency = pair.time([0], _PAGES[0], 10)[1:]
        if keep:
            pair.latency.extend(latency)
    finally:
        pair.signal(signal.SIGSTOP)


def _check(pairs: list[_Pair]) -> None:
    """The bytes have arrived: a bench of an engine that moves nothing would be the fastest."""
    for pair in pairs:
        if pair.name == "memcpy":
            continue
        pair.signal(signal.SIGCONT)
        digests = []
        for pipe in (pair.to_reader, pair.to_writer):
            pipe.send("digest")
            digests.append(_answer(pair.name, pipe, _ROUND_SECONDS))
        pair.signal(signal.SIGSTOP)
        if digests[0] != digests[1]:
            raise CommplaneError(f"case {pair.name!r}: the reader's bytes are not the writer's")


def _result(pairs: list[_Pair], absent: dict[str, str], nbytes: int, rounds: int) -> dict[str, Any]:
    by_name = {pair.name: pair for pair in pairs}

    def speeds(pair: _Pair, page: int) -> list[float]:
        return [nbytes / seconds / 1e9 for seconds in pair.seconds[page]]

    def ratio(one: str, other: str, page: int) -> float:
        pairwise = zip(speeds(by_name[one], page), speeds(by_name[other], page), strict=True)
        return round(statistics.median(a / b for a, b in pairwise), 3)

    cases = {
        pair.name: {
            **{f"GB/s at {page >> 10} KiB": round(statistics.median(speeds(pair, page)), 2) for page in _PAGES},
            "us for one page of 2 MiB": round(statistics.median(pair.latency) * 1e6, 1),
            "us for one page of 2 MiB, p90": round(statistics.quantiles(pair.latency, n=10)[-1] * 1e6, 1),
        }
        for pair in pairs
    }
    ratios = [
        {
            "of": one,
            "to": other,
            "wanted": wanted,
            **{f"found at {page >> 10} KiB": ratio(one, other, page) for page in _PAGES},
        }
        for one, other, wanted in _TARGETS
        if one in by_name and other in by_name
    ]
    return {
        "bench": "engines",
        "pool_mib": nbytes >> 20,
        "rounds": rounds,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "cases": cases,
        "ratios": ratios,
        "absent": absent,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines for a reader."""
    columns = list(next(iter(found["cases"].values()), {}))
    lines = [f"{found['pool_mib']} MiB, medians of {found['rounds']} rounds, {found['cpus']} cores, load {found['load'][0]}"]
    lines.append(f"{'':20}" + "".join(f"{column.replace(' for one page of', ','):>20}" for column in columns))
    lines += [f"{name:20}" + "".join(f"{row[column]:>20}" for column in columns) for name, row in found["cases"].items()]
    lines.append("")
    for row in found["ratios"]:
        large, small = (row[f"found at {page >> 10} KiB"] for page in _PAGES)
        lines.append(f"{row['of']} / {row['to']}: {large} at 2 MiB, {small} at 64 KiB; wanted {row['wanted']} or more")
    lines += [f"not here: {name}: {why}" for name, why in found["absent"].items()]
    return lines
