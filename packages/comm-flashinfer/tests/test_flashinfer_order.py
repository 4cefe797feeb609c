"""One workspace, one order of streams: what waits for what, and which of torch's streams are asked."""

from __future__ import annotations

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer_world import SUM, Rank, World

from commplane_flashinfer import calls
from commplane_flashinfer.order import CudaStreams, StreamOrder

pytestmark = pytest.mark.timeout(30)
DEVICE = torch.device("cuda:3")


class Streams:
    """Streams that remember what waited for what."""

    def __init__(self) -> None:
        self.in_capture: set[int] = set()
        self.edges: list[tuple[int, int]] = []

    def capturing(self, stream: int) -> bool:
        return stream in self.in_capture

    def after(self, stream: int, earlier: int) -> None:
        self.edges.append((stream, earlier))


def follow(order: StreamOrder, *streams: int) -> bool:
    """A call on each of `streams`, one after the other; whether one of them came while a capture was open."""
    in_capture = False
    for stream in streams:
        if stream != order.fast:
            in_capture |= order.follow(stream)
    return in_capture


def test_a_call_on_another_stream_waits_for_the_last_one() -> None:
    streams = Streams()
    order = StreamOrder(streams)
    follow(order, 0, 0, 7, 7, 0)
    assert streams.edges == [(7, 0), (0, 7)]


def test_a_capture_does_not_wait_for_what_ran_before_it_and_what_follows_waits_for_the_last_eager_call() -> None:
    streams = Streams()
    order = StreamOrder(streams)
    follow(order, 1)
    streams.in_capture = {2}
    follow(order, 2, 2)
    assert streams.edges == []
    streams.in_capture = set()
    follow(order, 2)
    assert streams.edges == [(2, 1)]


def test_streams_of_one_capture_are_ordered_by_edges_of_the_graph() -> None:
    streams = Streams()
    order = StreamOrder(streams)
    follow(order, 1)
    streams.in_capture = {1, 2, 3}
    follow(order, 2, 3, 3, 2)
    assert streams.edges == [(3, 2), (2, 3)]  # not of the eager one, whose work is not in the graph


def test_a_capture_on_the_stream_of_the_last_eager_call_is_ordered_from_its_first_call_on() -> None:
    streams = Streams()
    order = StreamOrder(streams)
    follow(order, 1)
    order.capture(True)
    follow(order, 1)  # warms up
    streams.in_capture = {1, 2}
    follow(order, 1, 2)
    assert streams.edges == [(2, 1)]
    streams.in_capture = set()
    order.capture(False)
    follow(order, 1, 1)
    assert (streams.edges, order.fast) == ([(2, 1)], 1)


def test_a_capture_has_no_edge_to_the_streams_of_another_one() -> None:
    streams = Streams()
    order = StreamOrder(streams)
    order.capture(True)
    streams.in_capture = {1}
    follow(order, 1)
    order.capture(False)
    order.capture(True)
    streams.in_capture = {1, 2}
    follow(order, 2, 1)
    assert streams.edges == [(1, 2)]


def test_an_eager_call_beside_a_capture_is_not_drawn_into_it() -> None:
    streams = Streams()
    order = StreamOrder(streams)
    follow(order, 1)
    streams.in_capture = {1}
    follow(order, 5)
    assert streams.edges == []


def test_only_a_call_while_a_capture_is_open_puts_a_workspace_into_graphs() -> None:
    order = StreamOrder(Streams())
    follow(order, 1)
    order.capture(True)
    order.capture(False)
    assert not follow(order, 1)
    order.capture(True)
    assert follow(order, 1)
    order.capture(False)
    assert not follow(order, 1)


def test_a_capture_that_the_plane_knows_nothing_of_puts_a_workspace_into_graphs_too() -> None:
    streams = Streams()
    order = StreamOrder(streams)
    streams.in_capture = {4}
    assert follow(order, 4)


class Cuda:
    """`torch.cuda`, whose streams have names: what waited for what, and on which stream it was asked for captures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str]] = []
        self.current = ""
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: self.named(f"the default stream of {device}"))
        monkeypatch.setattr(torch.cuda, "ExternalStream", self.external)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", self.capturing)

    def named(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda earlier: self.log.append((name, earlier.name)))

    def external(self, pointer: int, device: torch.device) -> Any:
        assert pointer, "torch takes 0 for no stream and gives another one of its pool"
        assert device == DEVICE
        return self.named(str(pointer))

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.current = stream.name
        yield

    def capturing(self) -> bool:
        self.log.append(("asked", self.current))
        return self.current == "9"


def test_the_default_stream_is_torchs_own_and_never_asked_whether_it_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, order = Cuda(monkeypatch), StreamOrder(CudaStreams(DEVICE))
    follow(order, 0)
    assert cuda.log == []
    follow(order, 7)
    assert cuda.log == [("asked", "7"), ("7", "the default stream of cuda:3")]
    cuda.log.clear()
    follow(order, 0)
    assert cuda.log == [("asked", "7"), ("the default stream of cuda:3", "7")]
    cuda.log.clear()
    assert follow(order, 9)
    assert cuda.log == [("asked", "9")]


def test_calls_of_two_dtypes_on_two_streams_are_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a workspace of its own; on the GPU both would wait for their peers at once."""
    world = World(2)
    streams = [Streams() for _ in world.ranks]
    stream = threading.local()
    monkeypatch.setattr(calls._Target, "enter", at(stream))

    def body(rank: Rank, r: int) -> list[tuple[int, int]]:
        rank.order = StreamOrder(streams[r])
        for stream.now, dtype in ((101, torch.bfloat16), (102, torch.float32), (102, torch.bfloat16), (101, torch.bfloat16)):
            rank.bind(SUM, dtype)(torch.ones(2048, dtype=dtype))
        return streams[r].edges

    assert world.run(body) == [[(102, 101), (101, 102)]] * 2


def at(stream: Any) -> Any:
    """`enter` of calls on the stream ``stream.now``, which a CPU has not."""
    enter = calls._Target.enter

    def enter_at(self: Any) -> None:
        self.stream = lambda index: stream.now
        enter(self)

    return enter_at
