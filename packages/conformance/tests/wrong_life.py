"""Backends that are wrong in one thing each of their life: captures, resources, threads, refusals, faults and deadlines."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pluggy
import torch
import torch.distributed as dist
from caught import catalogue
from honest import Honest
from torch import Tensor

from commplane.api import ReduceOp, Requirement, Workspace, owned_name
from commplane.errors import PeerError

CAUGHT_BY, caught_by = catalogue()


@caught_by("capture::test_replays_see_new_contents_and_eager_calls_go_between[2-ranks]")
class StaleOnReplay(Honest):
    """What was captured at an address is what every later call there returns."""

    capturing = False

    def capture_begin(self) -> None:
        self.capturing, self.seen = True, getattr(self, "seen", {})

    def capture_end(self, bootstrap: Any) -> None:
        self.capturing = False

    def all_reduce(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        out = super().all_reduce(tensor, op)
        if self.capturing:
            self.seen[tensor.data_ptr(), tensor.numel()] = out.clone()
        return getattr(self, "seen", {}).get((tensor.data_ptr(), tensor.numel()), out).clone()


@caught_by("life::test_close_twice_and_use_after_close[2-ranks]")
class ClosesOnce(Honest):
    """A second close raises."""

    def close(self) -> None:
        if self._pg is None:
            raise RuntimeError("already closed")
        super().close()


@caught_by("life::test_nothing_is_left_after_many_communicators[2-ranks]")
class LeaksASegment(Honest):
    """A name in shared memory that nobody removes."""

    def open(self, context: Any) -> None:
        super().open(context)
        (Path("/dev/shm") / owned_name("wrong")).touch()


@caught_by("life::test_nothing_is_left_after_many_communicators[4-ranks]")
class LeaksAnotherName(Honest):
    """A name of its own kind in shared memory, which does not say whose it is."""

    def open(self, context: Any) -> None:
        super().open(context)
        # The test of the kit removes those of its own folder.
        Path(f"/dev/shm/subject-{Path.cwd().parent.name}-{secrets.token_hex(8)}").touch()


class Nothing(Workspace):
    """A workspace for which nothing is built."""

    backend, nbytes = "subject", 0

    def close(self) -> None:
        return


@caught_by("life::test_a_prepare_that_fails_on_one_rank_changes_nothing[2-ranks]")
class GrowsAtOnce(Honest):
    """A workspace is used as soon as it is built, before the other ranks have theirs."""

    grown = False

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        self.grown = True
        return [Nothing()]

    def parts(self, flat: Tensor) -> list[Tensor]:
        # What it looks like where ranks have areas of two sizes: peers are read at the wrong place.
        return [-part for part in super().parts(-flat)] if self.grown else super().parts(flat)


@caught_by("life::test_nothing_is_left_after_many_communicators[3-ranks]")
class LeaksAThread(Honest):
    """A thread for each communicator, that outlives it."""

    def open(self, context: Any) -> None:
        super().open(context)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


@caught_by("life::test_calls_leave_no_memory_behind[2-ranks]")
class KeepsEveryCall(Honest):
    """A log of all calls."""

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        self.log = [*getattr(self, "log", []), f"all_reduce_ of {tensor.numel()} elements, {len(getattr(self, 'log', []))}"]
        return super().all_reduce_(tensor, op)


@caught_by("hot_path::test_no_hook_and_no_control_plane_on_the_hot_path[2-ranks]")
class HookOnEveryCall(Honest):
    """Asks plugins in each call."""

    plugins = pluggy.PluginManager("wrong")

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        self.plugins.get_plugins()
        return super().all_reduce_(tensor, op)


@caught_by("hot_path::test_in_place_calls_allocate_nothing[2-ranks]")
class AllocatesInPlace(Honest):
    """A copy on each call in place."""

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        return tensor.copy_(super().all_reduce_(tensor.clone(), op))


@caught_by("threads::test_the_thread_may_change_between_calls[2-ranks]")
class OneThreadOnly(Honest):
    """Belongs to the thread of its first real call."""

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        owner = self.__dict__.setdefault("owner", threading.get_ident())
        if owner != threading.get_ident():
            raise RuntimeError("called from another thread")
        return super().all_reduce_(tensor, op)


@caught_by("threads::test_other_threads_run_while_a_rank_waits[2-ranks]")
class HoldsTheLock(Honest):
    """Waits for its peer in native code that keeps Python's global lock."""

    def open(self, context: Any) -> None:
        super().open(context)
        names = [f"lock-{context.key.digest}-{os.getppid()}-{r}" for r in self.ranks]
        os.mkfifo(names[self.rank])
        context.bootstrap.barrier(what="pipes")
        self.pipes = [os.open(name, os.O_RDWR) for name in names]
        context.bootstrap.barrier(what="pipes are open")
        os.unlink(names[self.rank])

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        if tensor.numel() == 64 and self.n == 2:
            os.write(self.pipes[1 - self.rank], b"x")
            ctypes.PyDLL(None).read(self.pipes[self.rank], ctypes.create_string_buffer(1), 1)
        return super().all_reduce_(tensor, op)


@caught_by("refusals::test_an_undeclared_dtype_is_no_silent_no_op[2-ranks]")
class SilentOnUndeclared(Honest):
    """What it does not know comes back as it was."""

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        return tensor if tensor.dtype is torch.int16 else super().all_reduce_(tensor, op)


@caught_by("refusals::test_a_tensor_on_another_device_is_refused[2-ranks]")
class AnyDevice(Honest):
    """Does not look where a tensor is."""

    def all_reduce_(self, tensor: Tensor, op: ReduceOp) -> Tensor:
        return tensor if tensor.is_meta else super().all_reduce_(tensor, op)


@caught_by("faults::test_a_stopped_rank[2-ranks]")
class UnboundedWait(Honest):
    """Waits for a peer as long as it takes."""

    def open(self, context: Any) -> None:
        super().open(context)
        store = context.bootstrap.store("patient")
        self._pg = dist.ProcessGroupGloo(store, self.rank, self.n, timeout=timedelta(hours=1))


@caught_by("faults::test_a_killed_rank[2-ranks]")
class AccusesItself(Honest):
    """Names the wrong rank."""

    def _wait(self, what: str, start: Any) -> None:
        try:
            super()._wait(what, start)
        except PeerError as error:
            raise PeerError(str(error), [self.ranks[self.rank]]) from error


@caught_by("faults::test_an_absent_rank_in_every_collective[2-ranks]")
class ReturnsWithoutPeers(Honest):
    """Where a peer is missing, the call returns what there is."""

    def _wait(self, what: str, start: Any) -> None:
        with contextlib.suppress(PeerError):
            super()._wait(what, start)


@caught_by("faults::test_an_absent_rank_in_every_collective[4-ranks]")
class ReturnsWithoutASource(Honest):
    """A broadcast whose source is missing returns what was there."""

    inside = False

    def parts(self, flat: Tensor) -> list[Tensor]:
        self.inside = True
        try:
            return super().parts(flat)
        finally:
            self.inside = False

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        with contextlib.nullcontext() if self.inside else contextlib.suppress(PeerError):
            return super().broadcast(tensor, src)
        return tensor


@caught_by("faults::test_an_absent_rank_in_every_collective[3-ranks]")
class GivesUpEarly(Honest):
    """Has half the patience that it was given."""

    def open(self, context: Any) -> None:
        super().open(context)
        store = context.bootstrap.store("hasty")
        self._pg = dist.ProcessGroupGloo(store, self.rank, self.n, timeout=timedelta(seconds=context.timeout / 2))


@caught_by("faults::test_a_late_rank_is_waited_for[2-ranks]")
class Impatient(Honest):
    """Has a deadline of its own, shorter than the one it was given."""

    def open(self, context: Any) -> None:
        super().open(context)
        store = context.bootstrap.store("impatient")
        self._pg = dist.ProcessGroupGloo(store, self.rank, self.n, timeout=timedelta(milliseconds=150))


@caught_by("startup::test_a_build_that_fails_on_one_rank_before_it_began[2-ranks]")
class MeetsElsewhere(Honest):
    """Waits for its peers in files, and not through the bootstrap, so nobody can tell it that a peer failed; and for ever."""

    def open(self, context: Any) -> None:
        name = f"meet-{context.key.digest}-{os.getppid()}"
        Path(f"{name}-{context.rank}").touch()
        while not all(Path(f"{name}-{r}").exists() for r in range(context.world_size)):
            time.sleep(0.01)
        super().open(context)
