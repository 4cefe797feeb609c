"""Shared memory and file descriptors that run out, and ranks that are killed in the moment in which a segment has a name."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from car_calls import KINDS, prepared, raised, right, start
from car_forks import Server
from car_namespaces import needs_namespaces, own_shm
from car_threads import host

import commplane
from commplane import errors, hookimpl
from commplane.api import BackendSpec, BuildContext
from commplane.testing import Outcome, shm_leftovers
from commplane_custom_ar import _native

NEVER = {"timeout": 600}
PATIENCE_S = 120.0


def results(outcomes: Sequence[Outcome]) -> list[Any]:
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


# Shared memory.


def tiny_shm(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    with start(store, rank, world_size, **NEVER, custom_ar={"chunk_bytes": 1 << 22}) as plane:
        tp = plane.communicator("tp")
        out: dict[str, Any] = {"backends": list(tp.plan.backends)}
        out["reasons"] = [c.reason for c in tp.plan.candidates]
        if "custom_ar" in tp.plan.backends:
            for call in (
                lambda: tp.empty(64 << 20, dtype=torch.float32),
                lambda: tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 22),
                lambda: [tp.empty(1 << 18, dtype=torch.float32) for _ in range(100)],
            ):
                with pytest.raises(errors.CommunicatorError, match=r"failed and was rolled back on all ranks.*ENOSPC"):
                    call()
            # What was taken in vain is free again, and every byte of what is given can be written.
            buffer = tp.empty(1 << 18, dtype=torch.float32).fill_(1.0)
            out["symmetric"] = tp.all_reduce_(buffer).sum().item() / len(buffer)
        out["sum"] = tp.all_reduce(torch.ones(1_000_000)).mean().item()
        return out


@needs_namespaces
@pytest.mark.parametrize(
    ("size", "full", "reason"),
    [("4k", False, "ENOSPC"), ("100k", False, "ENOSPC"), ("8m", False, None), ("8m", True, "shared memory does not")],
)
def test_a_small_or_full_shared_memory_is_a_joint_refusal_and_never_a_bus_error(
    size: str, full: bool, reason: str | None
) -> None:
    server = Server(own_shm(size, full=full))
    try:
        said = results(server.run(2, tiny_shm, timeout=PATIENCE_S))
    finally:
        server.close()
    assert said[0] == said[1] and said[0]["sum"] == 2.0
    if reason is None:
        assert said[0]["backends"] == ["custom_ar", "torch"] and said[0]["symmetric"] == 2.0
    else:
        assert said[0]["backends"] == ["torch"] and any(reason in text for text in said[0]["reasons"]), said


# File descriptors.


@contextmanager
def no_descriptors() -> Iterator[None]:
    """Every descriptor that this process may have is in use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    held = []
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass
    try:
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def has_none_left(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    with start(store, rank, world_size, **NEVER) as plane:
        tp = plane.communicator("tp")
        out: dict[str, Any] = {}
        for what, call in {
            "empty": lambda: tp.empty(1000, dtype=torch.float32),
            "prepare": lambda: tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20),
        }.items():
            if rank == 1:
                with no_descriptors():
                    out[what] = raised(call)
            else:
                if what == "empty":
                    time.sleep(2)  # rank 1 waits for us, and looks whether we have ended: it cannot look, and must not say so
                out[what] = raised(call)
        out["symmetric"] = tp.all_reduce_(tp.empty(1000, dtype=torch.float32).fill_(1.0))[0].item()
        return out


def test_a_rank_without_file_descriptors_fails_the_step_on_all_ranks_and_they_go_on(forks: Server) -> None:
    settings = {"COMMPLANE_CUSTOM_AR_CHUNK_BYTES": str(1 << 20)}
    said = results(forks.run(3, has_none_left, timeout=PATIENCE_S, env=settings))
    for s in said:
        for what in ("empty", "prepare"):
            assert s[what]["error"] == "CommunicatorError" and "rank 1: " in s[what]["text"], s
            assert "Too many open files" in s[what]["text"], s
        assert s["symmetric"] == 3.0


def never_has_any(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    plane = start(store, rank, world_size, startup_timeout=10)
    plane.communicator("first").close()  # everything that creation imports is imported
    if rank != 1:
        said = raised(lambda: plane.communicator("tp"))
    else:
        with no_descriptors():
            said = raised(lambda: plane.communicator("tp"))
    return {**said, "open": len(plane.communicators)}


@pytest.mark.long
def test_a_rank_that_has_no_file_descriptor_for_any_backend_is_an_error_on_all_ranks(forks: Server) -> None:
    """Torch wants sockets, and may wait for some until the deadline; no rank must believe that it has a communicator."""
    for said in results(forks.run(3, never_has_any, timeout=PATIENCE_S)):
        assert said["error"] in ("SelectionError", "PeerError", "PeerFailed") and said["open"] == 0, said


class Exhausts:
    """A plugin of the site that takes every descriptor of rank 1 while custom_ar is built, and gives them back after it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.held: list[Any] = []

    @hookimpl
    def commplane_build_communicator(self, spec: BackendSpec, context: BuildContext) -> None:
        if self.rank == 1 and spec.name == "custom_ar":
            self.held.append(no_descriptors())
            self.held[0].__enter__()
        elif self.held:
            self.held.pop().__exit__(None, None, None)


def builds_without_descriptors(store: Any, rank: int, world_size: int) -> list[Any]:
    plugins = host()
    plugins.register(Exhausts(rank), "site")
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=plugins, config=NEVER) as plane:
        tp = plane.communicator("tp")
        return [list(tp.plan.backends), tp.plan.candidates[0].reason, tp.all_reduce(torch.ones(5)).tolist()]


def test_file_descriptors_that_lack_while_it_is_built_make_all_ranks_go_on_without_it(forks: Server) -> None:
    for backends, reason, total in results(forks.run(3, builds_without_descriptors, timeout=PATIENCE_S)):
        assert backends == ["torch"] and total == [3.0] * 5
        assert "rank 1: " in reason and "Too many open files" in reason, reason


# Killed while a segment has a name.


def dies_at(name: str, who: Sequence[int], rank: int) -> None:
    """From now on the ranks in `who` are killed by `Segment.NAME`: after create, before map and unlink."""
    real: Callable[..., Any] = getattr(_native.Segment, name)

    def dies(*args: Any) -> Any:
        if rank in who:
            if name == "create":
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(_native.Segment, name, staticmethod(dies))


def loses_a_rank_in_a_step(store: Any, rank: int, world_size: int, step: str, at: str, lost: int) -> dict[str, Any]:
    plane = start(store, rank, world_size, **NEVER, custom_ar={"chunk_bytes": 1 << 20})
    if step == "communicator":
        dies_at(at, [lost], rank)
        said = raised(lambda: plane.communicator("tp"))
        said["again"] = {}
    else:
        tp = plane.communicator("tp")
        dies_at(at, [lost], rank)
        if step == "empty":
            said = raised(lambda: tp.empty(1000, dtype=torch.float32))
        else:
            said = raised(lambda: tp.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20))
        said["again"] = raised(lambda: tp.all_reduce(torch.ones(1)))
    said["names"] = sorted(shm_leftovers())
    plane.close()
    return said


@pytest.mark.parametrize(("at", "lost"), [("create", 0), ("map", 0), ("map", 1), ("unlink", 0)])
@pytest.mark.parametrize("step", ["communicator", "empty", "prepare"])
def test_a_rank_killed_while_the_group_maps_is_named_and_its_name_removed(forks: Server, step: str, at: str, lost: int) -> None:
    before = shm_leftovers()
    outcomes = forks.run(3, loses_a_rank_in_a_step, step, at, lost, timeout=PATIENCE_S)
    assert outcomes[lost].returncode == -signal.SIGKILL, outcomes[lost].output
    for said in results([o for o in outcomes if o.rank != lost]):
        assert said["error"] == "PeerError" and said["missing"] == [lost] and "has ended" in said["text"], said
        assert step == "communicator" or (said["again"]["missing"] == [lost] and "poisoned" in said["again"]["text"]), said
    assert shm_leftovers() <= before


def all_die_while_they_map(store: Any, rank: int, world_size: int) -> None:
    plane = start(store, rank, world_size, **NEVER)
    dies_at("map", range(world_size), rank)
    plane.communicator("tp")


def starts(store: Any, rank: int, world_size: int) -> list[str]:
    start(store, rank, world_size).close()
    return sorted(shm_leftovers())


def test_names_that_no_rank_survived_to_remove_are_removed_by_the_next_start(forks: Server) -> None:
    before = shm_leftovers()
    outcomes = forks.run(3, all_die_while_they_map, timeout=PATIENCE_S)
    assert [o.returncode for o in outcomes] == [-signal.SIGKILL] * 3, [o.output for o in outcomes]
    (left,) = shm_leftovers() - before
    assert left.startswith("commplane-car-")
    assert left not in results(forks.run(1, starts, timeout=PATIENCE_S))[0]


def all_die_in_a_call(store: Any, rank: int, world_size: int, kind: str) -> None:
    plane = start(store, rank, world_size, **NEVER)
    call, wanted = prepared(plane.communicator("tp"), kind)
    signal.setitimer(signal.ITIMER_REAL, 0.01 * (rank + 1))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    while True:
        assert right(call(), wanted)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("all_reduce")])
def test_nothing_is_left_when_all_ranks_are_killed_in_a_call(forks: Server, kind: str) -> None:
    before = shm_leftovers()
    outcomes = forks.run(3, all_die_in_a_call, kind, timeout=PATIENCE_S)
    killed = [o.returncode == -signal.SIGKILL for o in outcomes]
    # Who was not quick enough learns that a peer is gone, and is no worse for it.
    assert killed[0] and all(k or o.error == "PeerError" for k, o in zip(killed, outcomes, strict=True)), outcomes
    assert shm_leftovers() <= before
