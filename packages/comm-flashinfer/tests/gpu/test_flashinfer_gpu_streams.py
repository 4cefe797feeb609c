"""One workspace, many streams: calls follow each other on the device, whichever stream or thread each comes from."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from flashinfer_gpu import EPS, by_flashinfer, groups, marks, ready
from gpu_numbers import expect, inputs, reduced
from gpu_ranks import Rank, World

from commplane.runtime import Communicator
from commplane_flashinfer.patterns import ALL_REDUCE, NORM

pytestmark = marks()

DTYPE = torch.bfloat16
CYCLES = 1_000_000_000  # about half a second of a GPU
COUNT, HIDDEN = 4096, 512
PLACES = [("default", "side"), ("side", "default"), ("side", "other")]


def streams(rank: Rank) -> dict[str, torch.cuda.Stream]:
    """The default one and three others. Made together they differ; torch gives one of 32 in turn, so a later one may be any."""
    others = ("side", "other", "capture")
    return {"default": torch.cuda.default_stream(rank.device), **{name: torch.cuda.Stream(rank.device) for name in others}}


def event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def ones(rank: Rank) -> torch.Tensor:
    return torch.ones(COUNT // HIDDEN, HIDDEN, dtype=DTYPE, device=rank.device)


def idle(rank: Rank) -> None:
    torch.cuda.synchronize()
    rank.plane.gather(0, what="idle")


class Pair:
    """A sum behind a long kernel on one stream, then a fused norm on another, with nothing between them but the backend."""

    def __init__(self, rank: Rank, tp: Communicator, first: torch.cuda.Stream, second: torch.cuda.Stream) -> None:
        self.tp, self.first, self.second, self.n = tp, first, second, rank.world_size
        self.early, self.late, self.residual, self.weight = ones(rank), ones(rank), ones(rank), ones(rank)[0].contiguous()
        self.begin, self.slept, self.early_done, self.late_done = event(), event(), event(), event()

    def start(self, cycles: int) -> None:
        """Queue both. Collective; does not wait."""
        for tensor in (self.early, self.late, self.residual):
            tensor.fill_(1.0)
        torch.cuda.synchronize()
        with torch.cuda.stream(self.first):
            self.begin.record()
            if cycles:
                torch.cuda._sleep(cycles)
            self.slept.record()
            with by_flashinfer(ALL_REDUCE):
                self.tp.all_reduce_(self.early)
            self.early_done.record()
        with torch.cuda.stream(self.second), by_flashinfer(NORM):
            self.tp.all_reduce_rms_norm_(self.late, self.residual, self.weight, EPS)
            self.late_done.record()

    def check(self, what: object) -> None:
        """After a synchronise: the second ended behind the first, though it was queued on a stream that was free."""
        slept, early, late = (self.begin.elapsed_time(e) for e in (self.slept, self.early_done, self.late_done))
        assert slept <= early <= late, f"{what}: ended after {early} ms, then {late} ms, the long kernel after {slept} ms"
        expect((what, "sum"), self.early, torch.full_like(self.early, float(self.n)))
        expect((what, "residual"), self.residual, torch.full_like(self.residual, float(self.n + 1)))


def in_order(rank: Rank, first: str, second: str) -> None:
    tp, places = ready(rank, DTYPE), streams(rank)
    pair = Pair(rank, tp, places[first], places[second])
    pair.start(0)  # what a first call does, such as loading a kernel, would wait for the whole device
    idle(rank)
    pair.check((first, second, "warm up"))
    for step in range(3):
        cycles = CYCLES << step
        pair.start(cycles)
        began_in_time = not pair.slept.query()
        idle(rank)
        pair.check((first, second, step))
        if all(rank.plane.gather(began_in_time, what="queued in time")):
            return
    raise AssertionError("both calls were never queued before the long kernel ended: nothing was proved on this machine")


@pytest.mark.parametrize(("first", "second"), PLACES)
@pytest.mark.parametrize("size", groups())
def test_a_call_on_another_stream_waits_for_the_one_before_it(world: World, first: str, second: str) -> None:
    world.run(in_order, first, second)


def alternating(rank: Rank) -> None:
    """60 calls on the default stream and two others in turn, with no wait between them but that for the inputs."""
    tp, n, device = ready(rank, DTYPE), rank.world_size, rank.device
    places = list(streams(rank).values())[:3]
    torch.cuda.synchronize()
    results = []
    for step in range(60):
        parts = inputs(n, COUNT, DTYPE, step, device)
        torch.cuda.current_stream(device).synchronize()
        with torch.cuda.stream(places[step % 3]), by_flashinfer(ALL_REDUCE):
            # The parts are kept: their memory belongs to the default stream, which would use it again while another one reads.
            results.append((tp.all_reduce(parts[rank.rank]), reduced(parts), parts))
    torch.cuda.synchronize()
    for step, (got, wanted, _) in enumerate(results):
        expect(("stream", step), got, wanted)


@pytest.mark.parametrize("size", groups())
def test_calls_on_three_streams_in_turn_all_give_their_own_sum(world: World) -> None:
    world.run(alternating)


def in_a_thread(call: Callable[[], None], device: torch.device) -> None:
    """Make the call in a thread of its own, and raise here what it raised."""
    raised: list[BaseException] = []

    def body() -> None:
        torch.cuda.set_device(device)
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), "the call in a thread did not return in 30 s"
    if raised:
        raise raised[0]


def beside_a_capture(rank: Rank, first: str, second: str, threaded: bool) -> None:
    """While a graph is captured, two eager calls elsewhere run, in order; and the graph holds its own calls alone."""
    tp, places = ready(rank, DTYPE), streams(rank)
    pair = Pair(rank, tp, places[first], places[second])
    pair.start(0)
    idle(rank)
    x, graph = ones(rank), torch.cuda.CUDAGraph()
    for tensor in (pair.early, pair.late, pair.residual):
        tensor.fill_(1.0)

    def eager() -> None:
        with torch.cuda.stream(places[first]):
            pair.begin.record()
            torch.cuda._sleep(CYCLES)
            pair.slept.record()
            tp.all_reduce_(pair.early)
            pair.early_done.record()
        with torch.cuda.stream(places[second]):
            tp.all_reduce_rms_norm_(pair.late, pair.residual, pair.weight, EPS)
            pair.late_done.record()

    with (
        by_flashinfer(ALL_REDUCE, NORM),
        rank.plane.capture(),
        torch.cuda.graph(graph, stream=places["capture"], capture_error_mode="thread_local"),
    ):
        tp.all_reduce_(x)
        if threaded:
            in_a_thread(eager, rank.device)
        else:
            eager()
        tp.all_reduce_(x)
    idle(rank)
    pair.check((first, second, "beside a capture"))
    expect("nothing of the graph ran", x, ones(rank))
    for step in range(2):
        x.fill_(1.0)
        graph.replay()
        torch.cuda.synchronize()
        expect(("replay", step), x, torch.full_like(x, float(rank.world_size**2)))
    pair.start(CYCLES)  # eager calls after a capture are in order again
    idle(rank)
    pair.check((first, second, "after the capture"))


@pytest.mark.parametrize("threaded", [False, True], ids=["same thread", "another thread"])
@pytest.mark.parametrize(("first", "second"), PLACES)
@pytest.mark.parametrize("size", groups(most=2))
def test_eager_calls_while_a_graph_is_captured_run_in_order_and_stay_out_of_it(
    world: World, first: str, second: str, threaded: bool
) -> None:
    world.run(beside_a_capture, first, second, threaded)


def forked(rank: Rank) -> None:
    """A capture that forks to a second stream and joins: the calls of both are one chain in the graph."""
    tp, n = ready(rank, DTYPE), rank.world_size
    places = streams(rank)
    side = places["side"]
    x, y, graph = ones(rank), ones(rank), torch.cuda.CUDAGraph()
    idle(rank)
    with by_flashinfer(ALL_REDUCE), rank.plane.capture(), torch.cuda.graph(graph, stream=places["capture"]):
        side.wait_stream(torch.cuda.current_stream(rank.device))
        for _ in range(4):
            tp.all_reduce_(x)
            with torch.cuda.stream(side):
                tp.all_reduce_(y)
        torch.cuda.current_stream(rank.device).wait_stream(side)
    for step in range(20):
        x.fill_(1.0)
        y.fill_(2.0)
        graph.replay()
        expect(("main", step), x, torch.full_like(x, float(n**4)))
        expect(("side", step), y, torch.full_like(y, 2.0 * n**4))
    torch.cuda.synchronize()


@pytest.mark.parametrize("size", groups())
def test_a_graph_over_two_streams_has_its_calls_in_one_chain(world: World) -> None:
    world.run(forked)


def far_apart(rank: Rank) -> None:
    """Ranks whose streams lag behind by different times still meet: each order is of one rank's device."""
    tp, places = ready(rank, DTYPE), streams(rank)
    pair = Pair(rank, tp, places["default"], places["side"])
    pair.start(0)
    idle(rank)
    for step in range(rank.world_size):
        pair.start(CYCLES // 4 if rank.rank == step else 0)
        idle(rank)
        pair.check(("apart", step))


@pytest.mark.parametrize("size", groups())
def test_ranks_whose_streams_lag_behind_each_other_still_meet(world: World) -> None:
    world.run(far_apart)
