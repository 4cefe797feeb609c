"""From the declaration to the close: what a backend says of itself, how it is opened, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from commplane import errors
from commplane.api import COMM_API, Capability
from commplane.api.shm import owner
from commplane.testing import shm_leftovers
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.oracle import expect, inputs
from commplane_conformance.rank import Rank, Skip
from commplane_conformance.subject import Subject
from commplane_conformance.worlds import World, Worlds

# In an interpreter of its own, whose host says that its comm API is a minor later than it is and than the plugin was made for.
_DECLARED_LATER = """
import json, sys
import commplane.api, commplane.api.versions
commplane.api.COMM_API = commplane.api.versions.COMM_API = tuple(json.loads(sys.argv[2]))
from commplane.config import Config
from commplane.plugins import PluginHost
host = PluginHost.discover(Config.load({}))
host.require([sys.argv[1]])
print(json.dumps(host.backends(sys.argv[3])[sys.argv[1]].spec.api))
"""


@clause("S56")
def test_the_api_number_is_a_literal(subject: Subject) -> None:
    made_for = subject.spec.api
    later = (made_for[0], max(made_for[1], COMM_API[1]) + 1)
    command = [sys.executable, "-c", _DECLARED_LATER, subject.name, json.dumps(later), subject.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"the plugin cannot be read under a later comm API: {done.stderr}"
    found = tuple(json.loads(done.stdout.splitlines()[-1]))
    assert found == made_for, (
        f"the api of {subject.name} follows the host's: it is {made_for}, and {found} where the host says {later}; write the "
        f"numbers that the plugin was made for"
    )


@clause("S56")
def test_what_is_declared_loads_no_torch(subject: Subject) -> None:
    code = (
        "import sys; from commplane.config import Config; from commplane.plugins import PluginHost; "
        f"host = PluginHost.discover(Config.load({{}})); assert {subject.name!r} in host.backends(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"reading the declaration of {subject.name} imported torch, or failed: {done.stderr}"


def in_plan(rank: Rank) -> list[str]:
    """With the canary, as users get it."""
    comm = rank.plane.communicator("conformance_canary", device=rank.job.device, backends=[rank.job.backend])
    rank.require(comm)
    comm.close()
    return list(comm.plan.backends)


@clause("S32")
def test_the_canary_finds_nothing(world: World) -> None:
    plans = world.run(in_plan)
    assert all(plan == plans[0] for plan in plans)


def closes_twice(rank: Rank) -> None:
    """The second close is no event, and every call after it says what happened."""
    comm = rank.form("conformance_close")
    backend = rank.backend(comm)
    x = torch.ones(8, device=rank.device)
    comm.all_reduce_(x)
    comm.close()
    comm.close()
    backend.close()
    calls: dict[str, Callable[[], object]] = {
        "all_reduce_": lambda: comm.all_reduce_(x),
        "all_reduce": lambda: comm.all_reduce(x),
        "all_gather": lambda: comm.all_gather(x),
        "reduce_scatter": lambda: comm.reduce_scatter(torch.ones(rank.world_size, device=rank.device)),
        "broadcast": lambda: comm.broadcast(x),
        "barrier": comm.barrier,
        "prepare": lambda: comm.prepare(max_bytes=64),
        "empty": lambda: comm.empty(4),
    }
    for name, call in calls.items():
        try:
            call()
        except errors.CommunicatorError as error:
            if "closed" not in str(error):
                raise AssertionError(f"{name} after close has to say that the communicator is closed, says {error}") from error
        else:
            raise AssertionError(f"{name} after close has to raise CommunicatorError")


@clause("S33", "S34")
@needs(Capability.ALL_REDUCE)
@needs_dtype("float32")
def test_close_twice_and_use_after_close(world: World) -> None:
    world.run(closes_twice)


def _held() -> dict[str, Any]:
    return {
        "threads": threading.active_count(),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "shared memory": sorted(shm_leftovers()),
        "mappings": sum("/dev/shm/" in line for line in Path("/proc/self/maps").read_text().splitlines()),
    }


def _names() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _nobodys(names: set[str]) -> set[str]:
    """Those of `names` in /dev/shm that are this user's and that no process maps; not those that say whose they are."""
    out = set()
    for name in names:
        if owner(name) is not None:
            continue
        with contextlib.suppress(FileNotFoundError):
            if Path("/dev/shm", name).stat().st_uid == os.getuid():
                out.add(name)
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            text = maps.read_text()
            out = {name for name in out if f"/dev/shm/{name}" not in text}
    return out


def opens_and_closes(rank: Rank, rounds: int) -> None:
    """Nothing is held that was not held before."""

    def one(i: int) -> None:
        comm = rank.form(f"conformance_cycle_{i % 2}")
        comm.all_reduce_(torch.ones(70_000, device=rank.device))
        if Capability.SYMMETRIC_MEMORY in rank.spec.capabilities:
            comm.empty(100)
        comm.close()

    for i in range(3):  # what is made once for all communicators is there now
        one(i)
    rank.plane.gather(None, what="all are warm")
    before, names = _held(), _names()
    for i in range(rounds):
        one(i)
    rank.plane.gather(None, what="all have closed")
    after, new = _held(), _names() - names
    # Connections of another rank's close may still be on their way out: only what grows with the rounds is a leak.
    for what in ("threads", "files", "mappings"):
        assert after[what] - before[what] < rounds, f"{rounds} communicators were closed and left {what}: {before} then {after}"
    assert after["shared memory"] == before["shared memory"]
    left = _nobodys(new) if len(new) >= rounds else set()  # whatever they are called
    assert len(left) < rounds, f"{rounds} communicators were closed and left in /dev/shm: {sorted(left)}"


@clause("S33", "S36")
@needs(Capability.ALL_REDUCE)
@needs_dtype("float32")
def test_nothing_is_left_after_many_communicators(world: World) -> None:
    world.run(opens_and_closes, 40 if world.subject.full else 8)


def forgotten(rank: Rank) -> None:
    """Warns, and does nothing else."""
    import gc
    import warnings

    comm = rank.form("conformance_forgotten")
    comm.all_reduce_(torch.ones(4, device=rank.device))
    backend = rank.backend(comm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rank.plane._communicators.remove(comm)
        del comm
        gc.collect()
    assert any(w.category is ResourceWarning for w in caught), "a communicator that is collected open has to warn"
    backend.close()


@clause("S34")
@needs(Capability.ALL_REDUCE)
@needs_dtype("float32")
def test_a_forgotten_communicator_warns(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        world.run(forgotten)


def prepares(rank: Rank, nbytes: int) -> None:
    """What was prepared works, and a difference is an error on all."""
    comm = rank.comm
    comm.prepare("all_reduce", dtype=torch.float32, max_bytes=nbytes)
    comm.prepare("all_reduce", dtype=torch.float32, max_bytes=nbytes // 2)
    n = rank.world_size
    for count in (1, nbytes // 4):
        assert comm.all_reduce(torch.ones(count, device=rank.device)).eq(n).all()
    try:
        comm.prepare("all_reduce", dtype=torch.float32, max_bytes=nbytes + 64 * rank.rank)
    except errors.MismatchError:
        pass
    else:
        raise AssertionError("ranks that prepare different sizes all have to raise MismatchError")
    assert comm.all_reduce(torch.ones(3, device=rank.device)).tolist() == [float(n)] * 3


@clause("S27", "S31")
@needs(Capability.ALL_REDUCE)
@needs_dtype("float32")
def test_prepare(world: World) -> None:
    world.run(prepares, 1 << 20)


def prepares_but_one(rank: Rank, culprit: int) -> None:
    """One rank cannot build its workspace: nothing of what the others built is used, and the next try may succeed."""
    comm = rank.form("conformance_prepare")
    cls, who = type(rank.backend(comm)), rank.rank
    real = cls.init_workspace

    def init_workspace(self: Any, requirements: Any) -> Any:
        if who == culprit:
            raise RuntimeError("injected into prepare")
        return real(self, requirements)

    def check_sums(when: str) -> None:
        for count in (1, 1000, 300_000):
            parts = inputs(rank.world_size, [count], torch.float32, count)
            expect(f"all_reduce of {count} float32 {when}", comm.all_reduce(rank.put(parts[who])), parts, "sum")

    with patch.object(cls, "init_workspace", init_workspace):
        try:
            comm.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 22)
        except errors.CommunicatorError as error:
            said = str(error)
        else:
            raise AssertionError(f"prepare returned on rank {who} although rank {culprit} could not build")
    assert "injected into prepare" in said, f"rank {who} does not know why prepare failed: {said}"
    check_sums(f"after a prepare that failed on rank {culprit}")
    comm.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 22)
    check_sums("after the prepare that followed")
    comm.close()


@clause("S31")
@needs(Capability.ALL_REDUCE)
@needs_dtype("float32")
def test_a_prepare_that_fails_on_one_rank_changes_nothing(world: World) -> None:
    world.run(prepares_but_one, world.size - 1)


def records(rank: Rank) -> None:
    """A backend that keeps flight records names the calls, in order."""
    comm = rank.form("conformance_records")
    backend = rank.backend(comm)
    if not type(backend).keeps_flight_records:
        comm.close()
        raise Skip(f"{rank.job.backend} leaves flight records to core")
    x = torch.ones(24, device=rank.device)
    for _ in range(3):
        comm.all_reduce_(x)
    found = list(backend.flight_records())[-3:]
    assert [r.collective for r in found] == ["all_reduce"] * 3, f"the last three calls were all_reduce, recorded are {found}"
    assert [r.seq for r in found] == list(range(found[0].seq, found[0].seq + 3)), f"numbers of calls must follow: {found}"
    assert all(r.nbytes == 96 and r.state == "done" and r.finished_ns is not None for r in found), found
    comm.close()


@clause("S46")
@needs(Capability.ALL_REDUCE)
@needs_dtype("float32")
def test_flight_records(world: World) -> None:
    world.run(records)


def steady_memory(rank: Rank) -> int:
    """Python memory that a thousand calls leave, in bytes."""
    x = torch.ones(256, device=rank.device)
    for _ in range(200):
        rank.comm.all_reduce_(x.fill_(1.0))
    tracemalloc.start()
    begin = tracemalloc.get_traced_memory()[0]
    for _ in range(1000):
        rank.comm.all_reduce_(x.fill_(1.0))
    grown = tracemalloc.get_traced_memory()[0] - begin
    tracemalloc.stop()
    return grown


@clause("S57")
@needs(Capability.ALL_REDUCE)
@needs_dtype("float32")
def test_calls_leave_no_memory_behind(world: World) -> None:
    for r, grown in enumerate(world.run(steady_memory)):
        assert grown < 64_000, f"a thousand calls left {grown} bytes of Python memory on rank {r}: something keeps each call"
