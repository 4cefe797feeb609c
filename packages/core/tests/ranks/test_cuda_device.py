"""Which CUDA device is current where, and that the canary waits for the device, with torch.cuda replaced where it is called."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import devices
import pytest
import torch

from commplane import errors
from commplane.agree import canary, on_device_if_possible
from commplane.api import BuildContext, Capability, Collective, CommBackend, ReduceOp, Requirement, Workspace
from commplane.runtime import Plane
from commplane.runtime.plane import _device
from commplane.testing import run_threads, without_canary

SYMMETRIC = {Capability.ALL_REDUCE, Capability.CAPTURE, Capability.SYMMETRIC_MEMORY}


class Current(threading.local):
    """The current device of each thread: 0 in a new one, as CUDA has it."""

    index = 0


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Current:
    """torch.cuda's guard, on a current device that is kept here."""
    state = Current()

    @contextmanager
    def guard(device: torch.device) -> Iterator[None]:
        before, state.index = state.index, device.index
        try:
            yield
        finally:
            state.index = before

    monkeypatch.setattr(torch.cuda, "device", guard)
    return state


class Placed(devices.Gathering):
    """Notes the current device of each step."""

    current: Any = None

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = [("construct", self.current.index)]

    def note(self, what: str) -> None:
        self.seen.append((what, self.current.index))

    def open(self, context: BuildContext) -> None:
        self.note("open")
        super().open(context)

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> None:
        self.note("ranges")

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        self.note("prepare")
        return []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.note("empty")
        return torch.empty(tuple(shape), dtype=dtype)

    def capture_begin(self) -> None:
        self.note("capture begins")

    def capture_end(self, bootstrap: Any) -> None:
        self.note("capture ends")

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        self.note("call")
        return super().all_reduce_(tensor, op)

    def close(self) -> None:
        self.note("close")
        super().close()


def run(function: Any, **config: Any) -> list[Any]:
    spec = devices.spec(device="cuda", factory="test_cuda_device:Placed", capabilities=SYMMETRIC)
    return run_threads(
        2,
        function,
        plugins=lambda _rank: devices.host(spec),
        config=lambda _rank: {"timeout": 30, **config},
        timeout=60,
    )


@pytest.fixture
def placed(current: Current, monkeypatch: pytest.MonkeyPatch) -> Current:
    monkeypatch.setattr(Placed, "current", current)
    return current


def test_every_step_finds_the_groups_device_current_and_a_call_finds_that_of_the_user(
    placed: Current, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("commplane.backends.torch_dist.TorchDistributed.open", fail_open)

    def rank_main(plane: Plane) -> Any:
        placed.index = 3
        comm = plane.communicator("tp", device="cuda:1")
        backend: Any = comm.backends[0]
        comm.prepare(max_bytes=64)
        comm.empty(4)
        comm.all_reduce_(torch.ones(4))
        with plane.capture():
            comm.all_reduce_(torch.ones(4))
        comm.close()
        assert placed.index == 3
        return list(dict.fromkeys(backend.seen))

    names = ("construct", "open", "ranges", "prepare", "empty", "call", "capture begins", "capture ends", "close")
    wanted = [(name, 3 if name == "call" else 1) for name in names]
    with without_canary():
        assert run(rank_main) == [wanted] * 2


def test_what_is_closed_after_a_failed_build_is_closed_on_its_device(placed: Current, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def fail(self: Placed, _context: BuildContext) -> None:
        seen.append(self.seen)
        raise RuntimeError("no room")

    monkeypatch.setattr(Placed, "open", fail)

    def rank_main(plane: Plane) -> None:
        with pytest.raises(errors.SelectionError, match="no room"):
            plane.communicator("tp", device="cuda:1")

    monkeypatch.setattr("commplane.backends.torch_dist.TorchDistributed.open", fail_open)
    assert run(rank_main) == [None, None]
    assert seen == [[("construct", 1), ("close", 1)]] * 2


def fail_open(self: CommBackend, _context: BuildContext) -> None:
    raise RuntimeError("nothing to fall back to here")


def on_the_cpu(context: BuildContext, dtype: torch.dtype, salt: int) -> torch.Tensor:
    """The canary's numbers where there is no GPU."""
    rows = torch.zeros(context.world_size, context.world_size * 9)
    for r in range(context.world_size):
        rows[r, r :: context.world_size] = 1 + (r + salt) % 5
    return rows.to(dtype)


class Later(devices.Gathering):
    """Its results come when the device is waited for."""

    pending: threading.local

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        right = super().all_reduce_(tensor.clone(), op)
        tensor.fill_(-1)
        self.pending.work = [*getattr(self.pending, "work", ()), lambda: tensor.copy_(right)]
        return tensor


@pytest.mark.parametrize("waits", [True, False])
def test_the_canary_compares_what_is_there_once_the_device_was_waited_for(
    current: Current, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    pending = threading.local()

    def synchronize(_device: object = None) -> None:
        work, pending.work = getattr(pending, "work", ()), ()
        for finish in work:
            finish()

    monkeypatch.setattr(Later, "pending", pending, raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize if waits else lambda _device=None: None)
    monkeypatch.setattr(canary, "_values", on_the_cpu)
    monkeypatch.setattr("commplane.backends.torch_dist.TorchDistributed.open", fail_open)
    monkeypatch.setattr("devices.Gathering", Later)

    def rank_main(plane: Plane) -> str:
        try:
            with plane.communicator("tp", device="cuda:0") as comm:
                return "+".join(comm.plan.backends)
        except errors.SelectionError as error:
            return str(error)

    spec = devices.spec(device="cuda", factory="devices:Gathering")
    out = run_threads(2, rank_main, plugins=lambda _rank: devices.host(spec), config=lambda _rank: {"timeout": 30}, timeout=60)
    if waits:
        assert out == ["twin", "twin"]
    else:
        assert all("(canary)" in text and "all_reduce sum, out of place of float32 is wrong" in text for text in out)


def test_a_device_that_never_comes_to_an_end_in_the_canary_takes_the_backend_out(
    placed: Current, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device=None: go_on.wait(30))
    monkeypatch.setattr(canary, "_values", on_the_cpu)
    monkeypatch.setattr("commplane.backends.torch_dist.TorchDistributed.open", fail_open)

    def rank_main(plane: Plane) -> str:
        with pytest.raises(errors.SelectionError) as caught:
            plane.communicator("tp", device="cuda:0")
        return str(caught.value)

    try:
        first, second = run(rank_main, startup_timeout=2)
        assert first == second
        assert "twin (canary): ranks 0, 1: twin canary did not finish in 2 s" in first
    finally:
        go_on.set()


def test_where_the_device_is_lost_a_close_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_device: object) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "device", lost)
    done = []
    said = pytest.warns(errors.CommplaneWarning, match="cuda:0 could not be made the current device: CUDA error")
    with said, on_device_if_possible("cuda:0"):
        done.append("closed")
    assert done == ["closed"]


@pytest.mark.parametrize(("local", "count", "device"), [("1", 2, "cuda:1"), ("1", 1, "cuda:0"), ("5", 4, "cuda:1")])
def test_the_device_of_a_rank_is_that_of_its_local_rank_among_those_it_sees(
    monkeypatch: pytest.MonkeyPatch, local: str, count: int, device: str
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert _device("cuda") == device
