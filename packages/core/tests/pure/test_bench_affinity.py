"""Which core a rank is put on, and that all of a process goes there and comes back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from commplane.api import Facts, RankFacts
from commplane.bench.affinity import core_of, pinned

CORES = sorted(os.sched_getaffinity(0))
several = pytest.mark.skipif(len(CORES) < 2, reason="with one core nothing can be put elsewhere")


def masks() -> dict[int, set[int]]:
    return {int(p.name): os.sched_getaffinity(int(p.name)) for p in Path("/proc/self/task").iterdir()}


@contextmanager
def sleeper(mask: set[int] | None = None) -> Iterator[int]:
    """A thread that waits, on cores of its own if told so; its id."""
    leave, there, ids = threading.Event(), threading.Event(), []

    def main() -> None:
        if mask is not None:
            os.sched_setaffinity(0, mask)
        ids.append(threading.get_native_id())
        there.set()
        leave.wait(30)

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert there.wait(30)
    try:
        yield ids[0]
    finally:
        leave.set()
        thread.join()


@several
def test_every_thread_is_on_the_core_inside_and_back_afterwards() -> None:
    with sleeper() as thread:
        with pinned(CORES[-1]):
            inside = masks()
        assert {thread, os.getpid()} <= inside.keys()
        assert all(mask == {CORES[-1]} for mask in inside.values()), inside
        assert all(mask == set(CORES) for mask in masks().values())


@several
def test_an_exception_inside_puts_everything_back_too() -> None:
    with pytest.raises(RuntimeError, match="inside"), pinned(CORES[0]):
        assert os.sched_getaffinity(0) == {CORES[0]}
        raise RuntimeError("inside")
    assert os.sched_getaffinity(0) == set(CORES)


@several
def test_a_thread_that_begins_inside_gets_the_cores_of_the_caller_afterwards() -> None:
    with pinned(CORES[0]):
        late = sleeper()
        thread = late.__enter__()
        assert os.sched_getaffinity(thread) == {CORES[0]}
    assert os.sched_getaffinity(thread) == set(CORES)
    late.__exit__(None, None, None)


@several
def test_a_thread_that_ends_inside_is_no_error() -> None:
    short = sleeper()
    short.__enter__()
    with pinned(CORES[0]):
        short.__exit__(None, None, None)
    assert os.sched_getaffinity(0) == set(CORES)


@several
def test_a_thread_with_cores_of_its_own_has_them_again_afterwards() -> None:
    with sleeper({CORES[1]}) as thread:
        with pinned(CORES[0]):
            assert os.sched_getaffinity(thread) == {CORES[0]}
        assert os.sched_getaffinity(thread) == {CORES[1]}


def test_a_core_that_there_is_not_is_refused_and_nothing_has_moved() -> None:
    with pytest.raises(OSError, match=r"Invalid argument"), pinned(1023):
        raise AssertionError("never inside")
    assert os.sched_getaffinity(0) == set(CORES)


def rank_facts(rank: int, cores: tuple[int, ...], domain: int | None = 0) -> RankFacts:
    return RankFacts(
        rank=rank,
        host="h",
        pid=rank,
        pid_start=0,
        pid_namespace="n",
        shm_domain=domain,
        shm_free=None,
        memory_limit=None,
        cores=cores,
        devices=(),
        machine="x86_64",
        python="3.11",
        torch=None,
    )


@pytest.mark.parametrize(
    ("masks_", "wanted"),
    [
        ([(0, 1), (0, 1)], [0, 1]),
        ([(4, 2), (4, 2)], [2, 4]),
        ([(0, 1)] * 4, [0, 1, 0, 1]),
        ([(0, 1), (2, 3)], [0, 3]),
        ([(3,), (5,)], [3, 5]),
    ],
    ids=["one each", "any numbers", "more ranks than cores", "masks of their own", "bound already"],
)
def test_ranks_of_a_host_take_the_cores_of_their_masks_in_turn(masks_: list[tuple[int, ...]], wanted: list[int]) -> None:
    facts = Facts([rank_facts(r, cores) for r, cores in enumerate(masks_)])
    assert [core_of(facts, r) for r in facts] == wanted


def test_ranks_are_counted_on_each_host_anew() -> None:
    facts = Facts([rank_facts(r, (0, 1), domain) for r, domain in enumerate([0, 1, 0, 1, None])])
    assert [core_of(facts, r) for r in facts] == [0, 0, 1, 1, 0]
