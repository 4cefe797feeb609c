"""The handle exchange in child processes: real ones, with a stand-in for GPU memory; ranks are threads."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from gpu_machine import UUIDS, Machine, all_of, ranks

from commplane.agree import StoreBootstrap
from commplane.api import Deadline
from commplane.api.facts import process_start
from commplane.errors import PeerError
from commplane_custom_ar.gpu.proof import Child, Proof, conclude, prove

# For what has to be waited out, and for what only has to be done by then on a machine that is busy.
SHORT_S, LONG_S = 5.0, 60.0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("gpus"))


class Started:
    """Starts children, and knows them afterwards."""

    def __init__(self) -> None:
        self.children: list[Child] = []

    def __call__(self, job: Mapping[str, Any], deadline: Deadline, environ: Mapping[str, str]) -> Child:
        self.children.append(Child(job, deadline, environ))
        return self.children[-1]

    def running(self) -> list[int]:
        """Processes that are still there."""
        out = []
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, 0)
                out.append(child.pid)
        return out


@pytest.fixture
def started() -> Iterator[Started]:
    out = Started()
    yield out
    assert not out.running()


def tried(
    machine: Machine, started: Started, faults: Mapping[int, str], seconds: float = LONG_S, uuids: list[str] | None = None
) -> list[Proof]:
    """Two ranks, or as many as there are `uuids`; rank -> what its process does wrong."""
    on = UUIDS[:2] if uuids is None else uuids
    ordinals = [UUIDS.index(uuid) for uuid in on]

    def rank_main(bootstrap: StoreBootstrap) -> Proof:
        rank = bootstrap.rank
        environ = machine.environ(STANDIN_FAULT=faults.get(rank, ""), STANDIN_GPUS=",".join(["H200"] * 8))
        library = str(machine.library)
        return prove(bootstrap, on, ordinal=ordinals[rank], library=library, seconds=seconds, environ=environ, start=started)

    return all_of(ranks(len(on), rank_main))


@pytest.mark.parametrize("uuids", [UUIDS[:2], [UUIDS[1], UUIDS[0], UUIDS[2]], [UUIDS[0], UUIDS[0]]])
def test_memory_that_goes_everywhere_is_proved_also_on_one_gpu(machine: Machine, started: Started, uuids: list[str]) -> None:
    found = tried(machine, started, {}, uuids=uuids)
    assert found == [Proof((), True, LONG_S)] * len(uuids)
    assert found[0].holds
    assert len({child.pid for child in started.children}) == len(uuids)
    assert os.getpid() not in {child.pid for child in started.children}


# What the process of rank 1 does, and what every rank then says of it.
WRONG = {
    "open fails": rf"P2P between GPU {UUIDS[1]} \(rank 1\) and GPU {UUIDS[0]} \(rank 0\) fails: .*_open failed: invalid device",
    "poke goes wrong": r"gives wrong data: 1 of 16384 words of rank 1 are wrong on rank 0 \(writes\)",
    "poke goes stale": r"gives wrong data: 16384 of 16384 words of rank 1 are wrong on rank 0 \(writes\)",
    "peek goes wrong": r"gives wrong data: 7 of 16384 words of rank 0 are wrong on rank 1 \(reads\)",
    "open dies": r"P2P between GPU .* \(rank 1\) and GPU .* \(rank 0\) fails: the process was ended by signal 9 in 'open'",
    "poke dies": r"fails: the process was ended by signal 9 in 'write'",
}


@pytest.mark.parametrize("fault", WRONG)
def test_what_goes_wrong_between_two_gpus_is_said_alike_on_every_rank(machine: Machine, started: Started, fault: str) -> None:
    found = tried(machine, started, {1: fault})
    assert found[0] == found[1]
    assert not found[0].holds
    assert found[0].conclusive
    assert len(found[0].failures) == 1
    assert re.search(WRONG[fault], found[0].failures[0]), found[0].failures


HANGS = {
    "open hangs": (rf"P2P between GPU {UUIDS[1]} \(rank 1\) and GPU {UUIDS[0]} \(rank 0\) hangs: no answer to 'open'", True),
    "poke hangs": (r"P2P between GPU .* hangs: no answer to 'write' within 5 s", True),
    "alloc hangs": (rf"the child process of rank 1 \(GPU {UUIDS[1]}\) hangs: no answer to 'start'", False),
}


def test_a_process_that_hangs_is_killed_and_that_is_what_is_found(machine: Machine, started: Started) -> None:
    with ThreadPoolExecutor(len(HANGS)) as pool:  # at once: each has to be waited out
        cases = list(pool.map(lambda fault: tried(machine, started, {1: fault}, SHORT_S), HANGS))
    for found, (words, conclusive) in zip(cases, HANGS.values(), strict=True):
        assert found[0] == found[1]
        assert not found[0].holds
        assert found[0].conclusive is conclusive
        assert any(re.search(words, failure) for failure in found[0].failures), found[0].failures


@pytest.mark.parametrize(
    ("fault", "words"),
    [("alloc fails", "memory_alloc failed: out of memory"), ("alloc dies", "was ended by signal 9 in 'start'")],
)
def test_a_process_that_does_not_come_so_far_says_nothing_of_the_gpus(
    machine: Machine, started: Started, fault: str, words: str
) -> None:
    found = tried(machine, started, {0: fault})
    assert found[0] == found[1]
    assert not found[0].holds
    assert not found[0].conclusive
    assert words in found[0].failures[0]


def test_a_child_that_sees_other_gpus_than_its_rank_refuses(machine: Machine, started: Started) -> None:
    on = [UUIDS[0], UUIDS[1]]

    def rank_main(bootstrap: StoreBootstrap) -> Proof:
        environ = machine.environ(CUDA_VISIBLE_DEVICES="1,0")
        rank, library = bootstrap.rank, str(machine.library)
        return prove(bootstrap, on, ordinal=rank, library=library, seconds=LONG_S, environ=environ, start=started)

    found = all_of(ranks(2, rank_main))
    assert found[0] == found[1]
    assert f"cuda:0 is {UUIDS[0]} in the rank and {UUIDS[1]} in its child process" in found[0].failures[0]


def test_a_library_without_its_cuda_half_and_a_rank_without_python_are_reasons_on_every_rank(
    machine: Machine, started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rank_main(bootstrap: StoreBootstrap) -> Proof:
        library = "/proc/self/exe" if bootstrap.rank else str(machine.library)
        environ = machine.environ()
        return prove(
            bootstrap, UUIDS[:2], ordinal=bootstrap.rank, library=library, seconds=LONG_S, environ=environ, start=started
        )

    found = all_of(ranks(2, rank_main))
    assert found[0] == found[1]
    assert "the native library does not load" in found[0].failures[0]
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    found = all_of(ranks(2, rank_main))
    assert found[0] == found[1]
    assert "its child process does not start" in found[0].failures[0]


def test_a_rank_that_stays_away_leaves_no_process_behind(machine: Machine, started: Started) -> None:
    def rank_main(bootstrap: StoreBootstrap) -> Proof | None:
        if bootstrap.rank == 1:
            bootstrap.fail("it has other plans")
            return None
        environ, library = machine.environ(), str(machine.library)
        return prove(bootstrap, UUIDS[:2], ordinal=0, library=library, seconds=LONG_S, environ=environ, start=started)

    found = ranks(2, rank_main)
    assert "it has other plans" in str(found[0])
    assert len(started.children) == 1  # the fixture looks whether it is gone


def test_a_child_ends_with_its_rank(machine: Machine, started: Started) -> None:
    # Without PR_SET_PDEATHSIG and without a kill: the socket of a rank that is gone is closed.
    job = {"rank": 0, "world_size": 1, "words": 64, "ordinal": 0, "uuid": UUIDS[0], "library": str(machine.library)}
    child = started(job, Deadline(LONG_S), machine.environ())
    assert child.answer() == {"answer": {}}
    child._link.close()
    assert child._process.wait(LONG_S) == 0
    child.close()


def test_a_child_that_hangs_does_not_outlive_a_rank_that_is_killed(machine: Machine) -> None:
    code = """
import json, os, signal, sys
from commplane.api import Deadline
from commplane_custom_ar.gpu.proof import Child

child = Child(json.loads(sys.argv[1]), Deadline(60.0), os.environ)
child.answer()
child._link.sendall(b'{"do": "allocate", "with": []}\\n')
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    job = {"rank": 0, "world_size": 1, "words": 64, "ordinal": 0, "uuid": UUIDS[0], "library": str(machine.library)}
    environ = machine.environ(STANDIN_FAULT="alloc hangs")
    command = [sys.executable, "-c", code, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S, env=environ, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid, end = int(done.stdout), time.monotonic() + LONG_S
    while process_start(pid) is not None:
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


def test_a_stopped_child_is_silent_and_killed_with_its_group(machine: Machine, started: Started) -> None:
    job = {"rank": 0, "world_size": 1, "words": 64, "ordinal": 0, "uuid": UUIDS[0], "library": str(machine.library)}
    deadline = Deadline(LONG_S)
    child = started(job, deadline, machine.environ())
    assert child.answer() == {"answer": {}}
    assert os.getpgid(child.pid) == child.pid
    os.kill(child.pid, signal.SIGSTOP)
    deadline._end = time.monotonic()
    assert child.ask("allocate") == {"silent": None}
    child.close()
    assert child._process.returncode == -signal.SIGKILL


def test_the_conclusion_depends_on_nothing_but_the_answers() -> None:
    fine = {"answer": {"written": {}, "read": {}}}
    assert conclude("verify", [fine, fine], UUIDS[:2], [4, 6], 1.0) is None
    answers = [{"silent": 1}, {"answer": {"written": {"0": 5}, "read": {"0": 3}}}]
    first, second = (conclude("verify", answers, UUIDS[:2], [4, 6], 1.0) for _ in range(2))
    assert first == second
    assert first is not None
    assert [re.findall(r"rank (\d)", failure)[:2] for failure in first.failures] == [["4", "6"], ["6", "4"], ["6", "4"]]
    assert Proof.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_a_rank_that_never_comes_is_named(machine: Machine, started: Started) -> None:
    def rank_main(bootstrap: StoreBootstrap) -> Proof | None:
        if bootstrap.rank == 1:
            return None
        environ, library = machine.environ(), str(machine.library)
        return prove(bootstrap, UUIDS[:2], ordinal=0, library=library, seconds=LONG_S, environ=environ, start=started)

    found = ranks(2, rank_main, patience=1.0)
    assert isinstance(found[0], PeerError)
    assert found[0].missing_ranks == (1,)
