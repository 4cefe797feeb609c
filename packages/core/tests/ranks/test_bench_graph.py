"""Measuring in graphs, with torch.cuda replaced where it is called: what is captured, in which order, and what is left out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import devices
import pytest
import torch

from commplane import errors
from commplane.api import Capability, Collective
from commplane.bench import form, measure, steps
from commplane.bench.graphs import CALLS
from commplane.bench.timing import Runner, take_turn
from commplane.runtime import Plane
from commplane.testing import run_threads

REPLAY_MS = 0.1
CAPTURES = devices.spec(capabilities={Capability.ALL_REDUCE, Capability.CAPTURE})
PLAIN = devices.spec()


class Device(threading.local):
    """What a rank's thread did: the events of the boundary, the replays so far, and whether it captures."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.replays = 0
        self.capturing = False


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """torch.cuda of the boundary. A captured call runs at once on the CPU; a replay counts as `REPLAY_MS` and runs nothing."""
    state = Device()

    class Graph:
        def replay(self) -> None:
            state.log.append("replay")
            state.replays += 1

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = state.replays

        def synchronize(self) -> None:
            state.log.append("wait")

        def elapsed_time(self, other: Any) -> float:
            return float((other.at - self.at) * REPLAY_MS)

    @contextmanager
    def graph(made: Graph, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        state.log.append("begin")
        state.capturing = True
        try:
            yield
        finally:
            state.capturing = False
            state.log.append("end")

    @contextmanager
    def inside(_what: object) -> Iterator[None]:
        yield

    stand_ins = {"CUDAGraph": Graph, "Event": Event, "graph": graph, "Stream": Stream, "current_stream": Stream}
    stand_ins |= {"device": inside, "stream": inside, "synchronize": lambda _device=None: state.log.append("synchronize")}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def run(function: Callable[[Plane], Any], spec: Any) -> list[Any]:
    out = run_threads(2, function, plugins=lambda _rank: devices.host(spec), config=lambda _rank: {"timeout": 30}, timeout=100)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def todo(plane: Plane, *sizes: int, collective: Collective = Collective.ALL_REDUCE) -> Any:
    return steps(plane, collectives=[collective], op="sum", dtypes=["float32"], sizes=sizes, hidden=4)


def during_captures(device: Device, comm: Any, fails: Callable[[int], bool] = lambda _n: False) -> list[bool]:
    """Whether each call of `comm` was made while this rank captured; the captured ones raise for which `fails` says so."""
    seen: list[bool] = []
    call = comm.all_reduce_

    def noted(*args: Any) -> Any:
        seen.append(device.capturing)
        result = call(*args)  # on the CPU it is one to wait for, so a rank that fails has to have made it
        if device.capturing and fails(sum(seen)):
            raise RuntimeError("operation not permitted when stream is capturing")
        return result

    comm.all_reduce_ = noted
    return seen


@pytest.mark.parametrize("spec", [CAPTURES, PLAIN], ids=["declares capture", "declares nothing"])
def test_each_candidate_is_captured_twenty_times_in_one_graph_and_its_replays_are_timed(device: Device, spec: Any) -> None:
    def rank_main(plane: Plane) -> Any:
        formed = form(plane, ["twin"], "bench", "cpu")
        seen = {name: during_captures(device, comm) for name, comm in formed.items()}
        entered: list[str] = []
        twin: Any = formed["twin"].backends[0]
        twin.capture_begin = lambda: entered.append("begin")
        twin.capture_end = lambda _bootstrap: entered.append("end")
        without: list[str] = []
        rows = measure(plane, formed, todo(plane, 64), pin="off", rounds=3, graph=True, left_out=without.append)
        assert [(r.backend, r.graph, r.median_us, r.p99_us) for r in rows] == [
            ("torch", True, 5.0, 5.0),
            ("twin", True, 5.0, 5.0),
        ]
        assert without == []
        for calls in seen.values():  # warm first, captured then, and nothing but replays afterwards
            assert calls == [False] * (len(calls) - CALLS) + [True] * CALLS and len(calls) > CALLS
        assert entered == (["begin", "end"] if spec is CAPTURES else [])
        assert all(r.iterations % (3 * CALLS) == 0 and r.vs_torch == 1.0 for r in rows)
        assert device.log.index("begin") > device.log.index("synchronize")
        assert device.replays * CALLS >= sum(r.iterations for r in rows)
        return [r.to_json() for r in rows]

    first, second = run(rank_main, spec)
    assert first == second


def test_a_candidate_that_cannot_be_captured_is_left_out_with_the_reason_and_the_others_are_measured(device: Device) -> None:
    def rank_main(plane: Plane) -> Any:
        formed = form(plane, ["twin"], "bench", "cpu")
        during_captures(device, formed["torch"], fails=lambda _n: True)
        without: list[str] = []
        rows = measure(plane, formed, todo(plane, 64, 128), pin="off", rounds=1, graph=True, left_out=without.append)
        return [(r.backend, r.bytes, r.vs_torch) for r in rows], without

    out = run(rank_main, CAPTURES)
    why = "cannot be captured: RuntimeError: operation not permitted when stream is capturing"
    wanted = [f"torch staged, all_reduce sum float32 {n} bytes: {why}" for n in (64, 128)]
    assert out == [([("twin", 64, None), ("twin", 128, None)], wanted)] * 2


@pytest.mark.parametrize("spec", [CAPTURES, PLAIN], ids=["declares capture", "declares nothing"])
def test_a_communicator_that_a_failed_capture_poisoned_is_closed_and_the_others_go_on(device: Device, spec: Any) -> None:
    def rank_main(plane: Plane) -> Any:
        formed = form(plane, ["twin"], "bench", "cpu")
        torch_comm: Any = formed["torch"]

        def poisoned(_n: int) -> bool:
            torch_comm.poison(RuntimeError("the capture broke it"))
            return True

        during_captures(device, torch_comm, fails=poisoned)
        without: list[str] = []
        rows = measure(plane, formed, todo(plane, 64, 128), pin="off", rounds=1, graph=True, left_out=without.append)
        assert torch_comm.closed
        return [(r.backend, r.bytes) for r in rows], len(without)

    assert run(rank_main, spec) == [([("twin", 64), ("twin", 128)], 1)] * 2


def test_a_capture_that_fails_on_one_rank_only_is_an_error_that_names_it(device: Device) -> None:
    def rank_main(plane: Plane) -> None:
        formed = form(plane, [], "bench", "cpu")
        during_captures(device, formed["torch"], fails=lambda n: plane.rank == 1 and n == CALLS)
        with pytest.raises(errors.CommplaneError, match=r"captured on all ranks but \[1\]: rank 1: RuntimeError: operation not"):
            measure(plane, formed, todo(plane, 64), pin="off", rounds=1, graph=True)

    run(rank_main, PLAIN)


def test_the_ways_to_write_a_norm_are_compared_in_graphs_too(device: Device) -> None:
    def rank_main(plane: Plane) -> Any:
        formed = form(plane, [], "bench", "cpu")
        rows = measure(plane, formed, todo(plane, 64, collective=Collective.ALL_REDUCE_RMS_NORM), pin="off", rounds=1, graph=True)
        return [(r.mode, r.graph, r.median_us, r.detail is not None) for r in rows], device.log.count("begin")

    assert run(rank_main, PLAIN) == [([("pair", True, 5.0, True)], 5)] * 2  # four ways, and the one that was taken


def test_eager_calls_on_a_gpu_are_one_number_for_a_batch_that_is_waited_for_at_its_end(device: Device) -> None:
    comm: Any = SimpleNamespace(barrier=lambda: device.log.append("barrier"), device="cuda:1", key=SimpleNamespace(device="cuda"))
    (took,) = take_turn(Runner(comm, lambda: device.log.append("call")), 20)
    assert took > 0
    assert device.log == ["barrier", "call", "call", "synchronize", *["call"] * 20, "synchronize"]
