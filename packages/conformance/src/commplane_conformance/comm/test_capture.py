"""Capture and replay.

On CUDA a replay is that of a graph. On CPU nothing is recorded: a replay there is the same calls once more on the same tensors,
which is where a backend that keeps something by address from the capture would show it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from commplane import errors
from commplane.api import Capability
from commplane_conformance.marks import clause, needs, needs_dtype
from commplane_conformance.oracle import expect_bits
from commplane_conformance.rank import Rank
from commplane_conformance.worlds import World, Worlds

pytestmark = [needs(Capability.ALL_REDUCE), needs_dtype("float32")]


def captured(rank: Rank, body: Callable[[], None]) -> Callable[[], None]:
    """Capture `body` once; a call of the result replays it."""
    if rank.device.type != "cuda":
        with rank.plane.capture():
            body()
        return body
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with rank.plane.capture(), torch.cuda.graph(graph, stream=stream):
        body()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def full(count: int, value: float) -> torch.Tensor:
    """What a tensor is to hold."""
    return torch.full((count,), value)


def replays(rank: Rank) -> None:
    """Two captures, replayed in turn with new contents, eager calls on other tensors between them."""
    n, device = rank.world_size, rank.device
    ranks = n * (n - 1) / 2
    rank.comm.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 20)
    static = [torch.zeros(count, device=device) for count in (16, 5000)]
    outs: list[torch.Tensor] = [torch.empty_like(s) for s in static]
    eager = torch.zeros(777, device=device)

    def body(i: int) -> Callable[[], None]:
        def reduce_static() -> None:
            outs[i].copy_(rank.comm.all_reduce(static[i]))

        return reduce_static

    graphs = [captured(rank, body(0)), captured(rank, body(1))]
    for step in range(6):
        i = step % 2
        static[i].fill_(float(100 * step + rank.rank))
        graphs[i]()
        wanted = 100 * step * n + ranks
        expect_bits(f"replay {step} of graph {i}, with new contents of its input", outs[i], full(len(outs[i]), wanted))
        expect_bits(f"the input of replay {step} of graph {i}", static[i], full(len(static[i]), 100.0 * step + rank.rank))
        eager.fill_(float(step + rank.rank))
        rank.comm.all_reduce_(eager)
        expect_bits(f"the eager call after replay {step}", eager, full(777, step * n + ranks))
        # An eager call on a tensor of the graph, too.
        expect_bits(f"an eager call on the input of graph {i}", rank.comm.all_reduce(static[i]), full(len(outs[i]), wanted))


@clause("S24", "S25", "S55")
@needs(Capability.CAPTURE)
def test_replays_see_new_contents_and_eager_calls_go_between(world: World) -> None:
    world.run(replays)


def two_communicators(rank: Rank) -> None:
    """Both are captured at once."""
    n = rank.world_size
    other = rank.form("conformance_capture")
    for comm in (rank.comm, other):
        comm.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 16)
    x, y = torch.zeros(64, device=rank.device), torch.zeros(64, device=rank.device)

    def body() -> None:
        y.copy_(other.all_reduce(rank.comm.all_reduce(x)))

    graph = captured(rank, body)
    for step in range(3):
        x.fill_(float(step + 1))
        graph()
        expect_bits(f"replay {step} of one sum after another on two communicators", y, full(64, float(n * n * (step + 1))))
    other.close()


@clause("S24", "S25")
@needs(Capability.CAPTURE)
def test_several_communicators_captured_together(world: World) -> None:
    world.run(two_communicators)


def growth(rank: Rank) -> None:
    """What would grow memory is refused inside a capture, and the communicator goes on."""
    for what, call in (
        ("prepare", lambda: rank.comm.prepare("all_reduce", dtype=torch.float32, max_bytes=1 << 22)),
        ("empty", lambda: rank.comm.empty(16)),
    ):
        try:
            with rank.plane.capture():
                call()
        except errors.CaptureError:
            continue
        raise AssertionError(f"{what} inside a capture has to raise CaptureError")


def goes_on(rank: Rank) -> None:
    """Whether the communicator still works; a capture that ended in an exception poisons the ones that capture."""
    try:
        rank.comm.all_reduce(torch.ones(4, device=rank.device))
    except errors.CaptureError:
        assert Capability.CAPTURE in rank.spec.capabilities, "a capture with nothing to capture poisoned the communicator"


@clause("S24", "S27")
def test_nothing_grows_inside_a_capture(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        world.run(growth)
        world.run(goes_on)


def uneven(rank: Rank, calls: list[int]) -> str:
    """Rank r captures ``calls[r]`` operations."""
    try:
        with rank.plane.capture():
            for _ in range(calls[rank.rank]):
                rank.comm.all_reduce(torch.ones(16, device=rank.device))
    except (errors.CaptureError, errors.PeerError, errors.MismatchError) as error:
        first = type(error).__name__
    else:
        raise AssertionError(f"ranks captured {calls} operations, and rank {rank.rank} was told nothing")
    try:
        rank.comm.all_reduce(torch.ones(16, device=rank.device))
    except errors.CommplaneError:
        return first
    raise AssertionError("the ranks are out of step after such a capture: the communicator has to refuse")


@clause("S25", "S26")
@needs(Capability.CAPTURE)
def test_a_rank_that_captures_more_or_fewer_operations(worlds: Worlds, size: int) -> None:
    for extra in (1, -1):
        with worlds.fresh(size, config={"run_timeout": 2, "startup_timeout": 15}) as world:
            world.run(uneven, [2] * (size - 1) + [2 + extra], limit=60)


def fails_inside(rank: Rank, culprit: int) -> str:
    """One rank raises inside the capture."""
    try:
        with rank.plane.capture():
            rank.comm.all_reduce(torch.ones(16, device=rank.device))
            if rank.rank == culprit:
                raise ValueError("out of luck")
            rank.comm.all_reduce(torch.ones(16, device=rank.device))
    except ValueError:
        assert rank.rank == culprit
        return "ValueError"
    except (errors.CaptureError, errors.PeerError) as error:
        assert rank.rank != culprit
        return type(error).__name__
    raise AssertionError("a rank failed inside the capture, and this one was told nothing")


@clause("S26")
@needs(Capability.CAPTURE)
def test_a_rank_that_fails_inside_a_capture(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size, config={"run_timeout": 2, "startup_timeout": 15}) as world:
        world.run(fails_inside, size - 1, limit=60)


def passes_through(rank: Rank) -> None:
    """A capture with no capturing backend in the plan is no event."""
    n = rank.world_size
    for _ in range(2):
        with rank.plane.capture():
            out = rank.comm.all_reduce(torch.ones(8, device=rank.device))
        assert rank.device.type == "cuda" or out.tolist() == [float(n)] * 8


@clause("S25")
def test_without_the_capability_a_capture_passes_through(world: World) -> None:
    if Capability.CAPTURE in world.subject.spec.capabilities:
        pytest.skip(f"{world.subject.name} declares the capability capture")
    if world.subject.device != "cpu":
        pytest.skip("on this device torch captures what backends do not know of")
    world.run(passes_through)
