"""Calls from other threads, and a fork after init."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch
from torch.distributed import TCPStore

from commplane import errors
from commplane.api import Capability
from commplane.runtime import Communicator
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World, Worlds

pytestmark = [needs(Capability.ALL_REDUCE), needs_dtype("float32")]


def in_thread(call: Callable[[], None]) -> threading.Thread:
    """Run `call` in a thread; `join_all` raises what it raised."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # raised again by join_all
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.failure = failure  # type: ignore[attr-defined]
    thread.start()
    return thread


def join_all(threads: list[threading.Thread]) -> None:
    """Wait for all; raise the first failure."""
    for thread in threads:
        thread.join()
    for thread in threads:
        for error in thread.failure:  # type: ignore[attr-defined]
            raise error


def sums(rank: Rank, comm: Communicator, calls: int, salt: int) -> None:
    """Check `calls` sums."""
    n = rank.world_size
    for i in range(calls):
        for count in (3, 4000):
            out = comm.all_reduce(torch.full((count,), float(salt + i + rank.rank), device=rank.device))
            wanted = float(n * (salt + i) + n * (n - 1) // 2)
            assert bool((out == wanted).all()), (
                f"call {i} of {count} float32 gave {out[out != wanted][0].item()}, wanted {wanted}"
            )


def other_threads(rank: Rank) -> None:
    """One thread after another."""
    for salt in range(4):
        join_all([in_thread(lambda salt=salt: sums(rank, rank.comm, 5, 100 * salt))])  # type: ignore[misc]
        sums(rank, rank.comm, 2, 7)


@clause("S22")
def test_the_thread_may_change_between_calls(world: World) -> None:
    world.run(other_threads)


def side_by_side(rank: Rank, calls: int) -> None:
    """Each thread has a communicator of its own."""
    comms = [rank.form(f"conformance_thread_{i}") for i in range(3)]

    def work(i: int, comm: Communicator) -> None:
        # Kernels of one stream run in the order in which they were launched, which between threads is another on each rank.
        with torch.cuda.stream(torch.cuda.Stream()) if rank.device.type == "cuda" else nullcontext():  # type: ignore[no-untyped-call]
            sums(rank, comm, calls, 1000 * i)

    join_all([in_thread(lambda i=i, c=c: work(i, c)) for i, c in enumerate(comms)])  # type: ignore[misc]
    for comm in comms:
        comm.close()


@clause("S22")
def test_communicators_in_threads_of_their_own(world: World) -> None:
    world.run(side_by_side, 100 if world.subject.full else 15)


def waits_beside_a_thread(rank: Rank, late: int, token: str) -> bool:
    """Rank `late` comes when another thread of each rank that waits for it has run; whether it has to give up on that."""
    n = rank.world_size
    store = TCPStore("127.0.0.1", rank.job.port, is_master=False)

    def says_so() -> None:
        time.sleep(0.2)  # until this rank waits; if it does not yet, the test proves less and fails no sooner
        store.set(f"{token}/{rank.rank}", "runs")

    beside, free = [], True
    if rank.rank == late:
        try:
            store.wait([f"{token}/{r}" for r in range(n) if r != late], timedelta(seconds=10))
        except RuntimeError:
            free = False
    else:
        beside.append(in_thread(says_so))
    out = rank.comm.all_reduce(torch.ones(64, device=rank.device))
    assert out.tolist() == [float(n)] * 64
    join_all(beside)
    return free


@clause("S23")
def test_other_threads_run_while_a_rank_waits(world: World) -> None:
    free = world.run(waits_beside_a_thread, 0, uuid.uuid4().hex)
    assert free[0], "no other thread ran on the ranks that waited for rank 0: release Python's global lock while waiting"


def forks(rank: Rank) -> None:
    """The child is refused, at once and without a trace; the parent goes on."""
    x = torch.ones(16, device=rank.device)
    rank.comm.all_reduce_(x)
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # a child that hangs would outlive the rank that is ended for it
        said = "returned"
        try:
            rank.comm.all_reduce_(torch.ones(4))
        except errors.CommunicatorError:
            said = "refused"
        except BaseException as error:  # told to the parent
            said = f"raised {error!r}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    assert said == "refused" and status == 0, f"the child of a fork {said or 'said nothing'} (status {status}), wanted a refusal"
    n = rank.world_size
    assert rank.comm.all_reduce(torch.ones(4, device=rank.device)).tolist() == [float(n)] * 4


@clause("S42")
def test_a_forked_child_is_refused_and_the_parent_goes_on(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        world.run(forks)
        world.run(forks)
