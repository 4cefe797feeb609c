"""The same cases on real processes, which are really killed and stopped. What is asserted holds however slow the machine is."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agreement_claims import judge_untimed, shown
from agreement_options import CASES, cases
from agreement_ranks import Case
from agreement_real import LIMIT_S, OverStore, RealTime
from agreement_scenario import FAULTS, Fault, Scenario
from torch.distributed import TCPStore

from commplane.api.shm import sweep
from commplane.testing import shm_leftovers

DEFAULT = 12
AT_ONCE = 4  # most of a case is waiting


def scenario(number: int) -> Scenario:
    """Case `number`: every third rank dies, every sixth stops; the others have one of the other faults, each in its turn."""
    choose = random.Random(number)
    ranks = choose.randint(2, 4)
    everyone = tuple(range(ranks))
    groups = [everyone] if ranks == 2 or choose.random() < 0.7 else [everyone, tuple(choose.sample(everyone, 2))]
    rank = choose.choice(groups[-1])
    if number % 3 == 0:
        fault = Fault("anywhere", "stop" if number % 6 == 0 else "die", rank, point=choose.randint(5, 110))
    else:
        others = [(p, how) for p, hows in FAULTS.items() for how in hows if p != "anywhere"]
        phase, how = others[(7 * number) % len(others)]
        # Late enough that a deadline of the others ends, or not at all near one.
        seconds = choose.choice([0.2, 6.0]) if how == "late" else 0.0
        fault = Fault(phase, how, rank, group=len(groups) - 1, backend=choose.randint(0, 1), seconds=seconds)
    return Scenario(ranks, tuple(groups), faults=(fault,), strict=choose.random() < 0.5)


class Server:
    """The process that forks ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "agreement_real.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, number: int, what: Scenario) -> None:
        folder = self.folder / str(number)
        folder.mkdir()
        job = {"case": number, "scenario": json.loads(what.to_json()), "port": self.store.port, "folder": str(folder)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def finished(self) -> tuple[int, dict[int, int]]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server that forks ranks has ended"
        said = json.loads(line)
        return said["case"], {int(rank): code for rank, code in said["codes"].items()}

    def case(self, number: int, what: Scenario, codes: dict[int, int]) -> Case:
        """What the ranks wrote down, as one case."""
        time: Any = RealTime(-1)
        out = Case(what, time, None, OverStore(None), None, {r: [] for r in range(what.ranks)}, True)  # type: ignore[arg-type]
        time.dead = {rank for rank, code in codes.items() if code == -9}
        # A rank that was stopped finds its deadlines expired when it goes on, that of its call to the store too; on a machine
        # that is slow enough any call to the store may miss its own.
        out.cut_off = {f.rank for f in what.faults if f.how == "stop"}
        for rank, code in codes.items():
            log = (self.folder / str(number) / f"{rank}.log").read_text()
            assert code in (0, -9), f"rank {rank} ended with {code}: {log}"
            if code == 0:
                said = pickle.loads((self.folder / str(number) / f"{rank}.pickle").read_bytes())
                out.logs[rank] = said["log"]
                if any("the store has not answered" in str(r.error) for r in said["log"]):
                    out.cut_off.add(rank)
                for record, cause in zip(said["log"], said["causes"], strict=True):
                    if cause:
                        record.error.__cause__ = RuntimeError(cause)
                    if record.body is not None:
                        record.body = record.error
                out.fired.update(said["fired"])
                out.built.extend((rank, _Closed(name, closes)) for name, closes in said["built"])  # type: ignore[misc]
                out.workspaces.extend((rank, _Closed(name, closes)) for name, closes in said["workspaces"])  # type: ignore[misc]
                time.failures.extend(said["failures"])
        return out


class _Closed:
    def __init__(self, name: str, closes: int) -> None:
        self.name = name
        self.closes = closes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    out = Server(tmp_path)
    yield out
    assert out.process.stdin is not None
    out.process.stdin.close()
    out.process.wait(LIMIT_S)


# What --full takes; by default it is less than half a minute.
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_processes_agree_under_fire(server: Server, request: pytest.FixtureRequest) -> None:
    total = DEFAULT * cases(request.config) // CASES
    waiting = list(range(total))
    running: set[int] = set()
    killed = 0
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            number = waiting.pop(0)
            server.begin(number, scenario(number))
            running.add(number)
        number, codes = server.finished()
        running.discard(number)
        what = scenario(number)
        dies = {f.rank for f in what.faults if f.how == "die"}
        assert {rank for rank, code in codes.items() if code == -9} <= dies, f"case {number}: {codes}; {what}"
        killed += -9 in codes.values()
        case = server.case(number, what, codes)
        try:
            judge_untimed(case)
        except AssertionError as error:
            raise AssertionError("\n".join([f"case {number}: {error}", repr(what), *shown(case)])) from None
    assert killed or total < 10
    sweep()  # as the next start does
    assert not shm_leftovers()
