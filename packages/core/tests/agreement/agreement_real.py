"""The same script on real processes, with real clocks: what a rank does there, and a server that forks them.

A process that has torch imported forks a rank in milliseconds. The server has no thread, reads one case a line, and answers when
its ranks have ended. A rank that a case stops (SIGSTOP) goes on when all others have ended.
"""

from __future__ import annotations

import json
import os
import pickle
import select
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from agreement_backend import CASES, Scripted, not_come
from agreement_ranks import Case, rank_main
from agreement_scenario import Scenario
from torch.distributed import PrefixStore, TCPStore

import commplane
from commplane import errors
from commplane.agree import REAL

# A rank that has not ended by then is killed: no wait of a case comes near.
LIMIT_S = 120.0


class RealTime:
    """What a `Case` uses of a simulation, for one rank that is a process."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.clock = REAL
        self.sleep = time.sleep
        self.dead: set[int] = set()
        self.points: Counter[int] = Counter()
        self.failures: list[tuple[str, BaseException]] = []

    @property
    def time(self) -> float:
        return time.monotonic()


class FatalStore:
    """A store; at one of its calls this process is killed or stopped. Counts the rounds that this rank comes to."""

    def __init__(self, store: Any, rank: int, fatal: dict[int, signal.Signals]) -> None:
        self._store = store
        self._calls = 0
        self._fatal = fatal
        self.rounds: Counter[int] = Counter()
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any) -> Any:
            self._calls += 1
            if self._calls in self._fatal:
                os.kill(os.getpid(), self._fatal[self._calls])
            parts = str(args[0]).split("/") if args else []
            if name == "append" and parts[-1] == "in" and parts[-2].isdigit() and "build" not in parts:
                self.rounds[self._rank] += "world" in parts or len(parts) == 7
            return method(*args)

        return call


class OverStore:
    """An `Exchange` between processes."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def meet(self, backend: Scripted, call: int, mine: torch.Tensor) -> list[torch.Tensor]:
        context = backend.context
        assert context is not None
        base = f"data/{backend.token}/{call}"
        keys = [f"{base}/{r}" for r in context.ranks]
        self._store.set(f"{base}/{backend.rank}", json.dumps(mine.tolist()))
        deadline = time.monotonic() + context.timeout
        # One outcome for all of the group, as in memory: complete, or who is missing.
        while not (outcome := self._store.compare_set(f"{base}/outcome", "", "").decode()):
            absent = [r for r, key in zip(context.ranks, keys, strict=True) if not self._store.check([key])]
            left = [r for r in absent if self._store.check([f"data/{backend.token}/left/{r}"])]
            if left or not absent or time.monotonic() >= deadline:
                self._store.compare_set(f"{base}/outcome", "", json.dumps(left or absent))
            else:
                time.sleep(0.01)
        missing = json.loads(outcome)
        if missing:
            raise not_come(context, missing)
        return [torch.tensor(json.loads(self._store.get(key)), dtype=mine.dtype) for key in keys]

    def leave(self, backend: Scripted) -> None:
        self._store.set(f"data/{backend.token}/left/{backend.rank}", "1")


def _bounded_calls() -> list[str]:
    """Calls with a deadline that have not returned; their threads are kept, under another name, when they have."""
    names = (thread.name for thread in threading.enumerate())
    return [name for name in names if name.startswith("commplane") and name.endswith((" build", " canary", "probe"))]


def _rank(job: dict[str, Any], rank: int) -> None:
    """One rank, in a process of its own: what it saw goes to a file."""
    torch.set_num_threads(1)
    scenario = Scenario.from_json(json.dumps(job["scenario"]))
    signals = {"die": signal.SIGKILL, "stop": signal.SIGSTOP}
    fatal = {f.point: signals[f.how] for f in scenario.faults if f.rank == rank and f.how in signals}
    store = FatalStore(PrefixStore(f"case/{job['case']}", _client(job)), rank, fatal)
    ours = PrefixStore(f"case/{job['case']}", _client(job))
    real: Any = RealTime(rank)
    logs = {r: [] for r in range(scenario.ranks)}
    case = Case(scenario, real, store, OverStore(ours), partial(commplane.init), logs)  # type: ignore[arg-type]
    CASES.append(case)
    warnings.simplefilter("error" if scenario.strict else "ignore", errors.CommplaneWarning)
    rank_main(case, rank)
    deadline = time.monotonic() + LIMIT_S
    while _bounded_calls() and time.monotonic() < deadline:  # one that was left to itself releases what it built when it is back
        time.sleep(0.01)
    for record in case.logs[rank]:
        record.value = record.value if not hasattr(record.value, "digest") else _told(record.value)
    said = {
        "log": case.logs[rank],
        "causes": [str(r.error.__cause__) if r.error is not None and r.error.__cause__ else "" for r in case.logs[rank]],
        "fired": case.fired,
        "built": [(b.name, b.closes) for _, b in case.built],
        "workspaces": [(w.backend, w.closes) for _, w in case.workspaces],
        "failures": [(name, repr(error)) for name, error in real.failures],
    }
    part = Path(job["folder"]) / f"{rank}.part"
    part.write_bytes(pickle.dumps(said))
    part.rename(part.with_suffix(".pickle"))


def _client(job: dict[str, Any]) -> Any:
    return TCPStore("127.0.0.1", job["port"], is_master=False)


class _Told:
    """A plan as it travels: what the claims read of it."""

    def __init__(self, digest: str, backends: tuple[str, ...], candidates: Any) -> None:
        self.digest = digest
        self.backends = backends
        self.candidates = candidates


def _told(plan: Any) -> _Told:
    return _Told(plan.digest, plan.backends, plan.candidates)


def _serve() -> None:
    cases: dict[int, dict[int, int]] = {}  # case -> rank -> pid of those that run
    codes: dict[int, dict[int, int]] = {}
    until: dict[int, float] = {}
    reading = True
    while reading or cases:
        if reading and select.select([sys.stdin.fileno()], [], [], 0.02 if cases else None)[0]:
            line = sys.stdin.readline()
            reading = bool(line)
            if line:
                job = json.loads(line)
                number = job["case"]
                cases[number], codes[number], until[number] = {}, {}, time.monotonic() + LIMIT_S
                for rank in range(job["scenario"]["ranks"]):
                    pid = os.fork()
                    if pid == 0:
                        _in_child(job, rank)
                    cases[number][rank] = pid
        elif not reading:
            time.sleep(0.02)
        for number, running in list(cases.items()):
            for rank, pid in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                if done and os.WIFSTOPPED(status):
                    codes[number][rank] = signal.SIGSTOP
                elif done:
                    codes[number][rank] = os.waitstatus_to_exitcode(status)
                    del running[rank]
                elif time.monotonic() > until[number]:
                    os.kill(pid, signal.SIGKILL)
            if running and all(codes[number].get(rank) == signal.SIGSTOP for rank in running):
                for rank, pid in running.items():  # the others have ended without it
                    codes[number].pop(rank)
                    os.kill(pid, signal.SIGCONT)
            if not running:
                del cases[number]
                print(json.dumps({"case": number, "codes": codes[number]}), flush=True)


def _in_child(job: dict[str, Any], rank: int) -> None:
    code = 1
    try:
        with open(Path(job["folder"]) / f"{rank}.log", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            _rank(job, rank)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    # The claims unpickle what is defined here by the name of the module, not as "__main__".
    import agreement_real

    agreement_real._serve()
