"""Graphs on GPUs: replays, eager calls between them, inputs that are read where they are, and captures that go wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_numbers import DTYPES, checksum, expect, inputs, reduced, ulps
from gpu_ranks import Rank, World, Worlds, needs_gpu, only, sizes

import commplane
from commplane import errors
from commplane.api import add_rms_norm
from commplane.testing import run_processes

pytestmark = needs_gpu()

COUNTS = [8, 4097, 300_000, 2_500_001]


def captured(rank: Rank, body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `body`. Collective."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with rank.plane.capture(), torch.cuda.graph(graph):
        body()
    return graph


def graphs_and_eager_calls(rank: Rank, options: dict[str, Any], symmetric: bool) -> list[int]:
    """A graph for each size, in and out of place; replayed in turn with new contents, eager calls on the same tensors between."""
    tp, device, n, checks = rank.comm(**options), rank.device, rank.world_size, []
    dtype = torch.bfloat16

    def new(count: int) -> torch.Tensor:
        return tp.empty(count, dtype=dtype) if symmetric else torch.empty(count, dtype=dtype, device=device)

    ins, places = [new(count) for count in COUNTS], [new(count) for count in COUNTS]
    outs: dict[int, torch.Tensor] = {}

    def body(i: int) -> Callable[[], None]:
        def reduce_twice() -> None:
            outs[i] = tp.all_reduce(ins[i])
            tp.all_reduce_(places[i])

        return reduce_twice

    graphs = [captured(rank, body(i)) for i in range(len(COUNTS))]
    for step in range(12):
        i = step % len(COUNTS)
        parts = inputs(n, COUNTS[i], dtype, step, device)
        mine, wanted = parts[rank.rank], reduced(parts)
        ins[i].copy_(mine)
        places[i].copy_(mine)
        graphs[i].replay()
        eager = tp.all_reduce(ins[i])
        expect((options, step, "replayed, out of place"), outs[i], wanted)
        expect((options, step, "replayed, in place"), places[i], wanted)
        expect((options, step, "its input"), ins[i], mine)
        expect((options, step, "eager"), eager, wanted)
        checks += [checksum(outs[i]), checksum(places[i])]
    # Replays with no wait between them, whose inputs change in between.
    for step in range(20):
        ins[1].fill_(float(step + rank.rank))
        graphs[1].replay()
        tp.all_reduce_(places[0].fill_(1.0))
    expect("after 20 replays", outs[1], torch.full_like(outs[1], float(19 * n + n * (n - 1) // 2)))
    expect("after 20 eager calls", places[0], torch.full_like(places[0], float(n)))
    torch.cuda.synchronize()
    return checks


@pytest.mark.parametrize("size", sizes())
def test_graphs_are_replayed_in_turn_with_eager_calls_between(world: World) -> None:
    first, *others = world.run(graphs_and_eager_calls, {}, False)
    assert all(other == first for other in others)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "registered"])
@pytest.mark.parametrize("algorithm", ["one_shot_pull", "two_shot_pull"])
@pytest.mark.parametrize("size", sizes(most=3))
def test_graphs_read_the_inputs_of_all_ranks_where_they_are(world: World, algorithm: str, symmetric: bool) -> None:
    options = {"algorithm": algorithm, "registered": "off" if symmetric else "on"}
    first, *others = world.run(graphs_and_eager_calls, options, symmetric)
    assert all(other == first for other in others)


def everything_in_one_graph(rank: Rank) -> None:
    """All collectives of two communicators in one capture; the sum of one is the input of the other."""
    a, b, device, n = rank.comm(), rank.comm(algorithm="two_shot_push"), rank.device, rank.world_size
    dtype, hidden = torch.bfloat16, 1024
    x = torch.zeros(n * 4, hidden, dtype=dtype, device=device)
    weight = torch.ones(hidden, dtype=dtype, device=device)
    residual = torch.zeros_like(x)
    got: dict[str, torch.Tensor] = {}

    def body() -> None:
        got["sum"] = a.all_reduce(x)
        got["norm"], got["residual"] = b.all_reduce_rms_norm(got["sum"], residual, weight, 1e-5)
        got["gather"] = a.all_gather(x)
        got["scatter"] = b.reduce_scatter(x)
        a.barrier()
        got["broadcast"] = b.broadcast(x.clone(), n - 1)

    graph = captured(rank, body)
    for step in range(4):
        parts = [p.view_as(x) for p in inputs(n, x.numel(), dtype, step, device)]
        x.copy_(parts[rank.rank])
        residual.copy_(parts[0])
        graph.replay()
        total = reduced(parts)
        expect(("sum", step), got["sum"], total)
        norm, wanted = add_rms_norm(reduced([total] * n), residual, weight, 1e-5)
        expect(("residual", step), got["residual"], wanted)
        assert ulps(got["norm"], norm) <= 2.0
        expect(("gather", step), got["gather"], torch.cat(parts))
        expect(("scatter", step), got["scatter"], total.chunk(n)[rank.rank])
        expect(("broadcast", step), got["broadcast"], parts[n - 1])
    torch.cuda.synchronize()


@pytest.mark.parametrize("size", sizes())
def test_all_collectives_of_two_communicators_go_into_one_graph(world: World) -> None:
    world.run(everything_in_one_graph)


def two_graphs_in_one_capture(rank: Rank) -> None:
    """plane.capture once around two torch graphs."""
    tp, n = rank.comm(), rank.world_size
    x, y = torch.zeros(64, device=rank.device), torch.zeros(100_000, device=rank.device)
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with rank.plane.capture():
        with torch.cuda.graph(first):
            tp.all_reduce_(x)
        with torch.cuda.graph(second):
            tp.all_reduce_(y)
    for graph, tensor in ((second, y), (first, x), (second, y)):
        tensor.fill_(1.0)
        graph.replay()
        expect("replay", tensor, torch.full_like(tensor, float(n)))


@pytest.mark.parametrize("size", sizes(most=3))
def test_one_capture_holds_several_graphs(world: World) -> None:
    world.run(two_graphs_in_one_capture)


def outcome(call: Callable[[], object]) -> dict[str, Any]:
    try:
        call()
    except Exception as error:
        # Who only waited in vain raises what it waited for, from what the vote told it.
        text = "; from ".join(str(e) for e in (error, error.__cause__) if e is not None)
        return {"error": type(error).__name__, "text": text, "ours": isinstance(error, errors.CommplaneError)}
    return {"error": None, "text": "", "ours": False}


def uneven(rank: Rank, calls: list[int]) -> list[Any]:
    """Rank r captures ``calls[r]`` operations. Then, with a new communicator, all goes on."""
    tp = rank.form("uneven")
    x = torch.ones(1000, device=rank.device)

    def body() -> None:
        for _ in range(calls[rank.rank]):
            tp.all_reduce_(x)

    first = outcome(lambda: captured(rank, body))
    then = outcome(lambda: tp.all_reduce(x))
    tp.close()
    with rank.form("after") as again:
        total = again.all_reduce(torch.ones(5, device=rank.device)).tolist()
    return [first, then, total]


@pytest.mark.parametrize("size", sizes(most=3))
def test_ranks_that_captured_different_operations_are_all_told(worlds: Worlds, size: int) -> None:
    with worlds.short(size, 1.5) as world:
        for first, then, total in world.run(uneven, [2] * (size - 1) + [3]):
            assert first["error"] in ("CaptureError", "MismatchError"), first
            assert "different operations" in first["text"] or "different" in first["text"], first
            assert then["ours"], then
            assert total == [float(size)] * 5


def fails_inside(rank: Rank, culprit: int) -> list[Any]:
    tp = rank.form("fails")
    x = torch.ones(1000, device=rank.device)

    def body() -> None:
        tp.all_reduce_(x)
        if rank.rank == culprit:
            raise ValueError("out of luck")
        tp.all_reduce_(x)

    first = outcome(lambda: captured(rank, body))
    then = outcome(lambda: tp.all_reduce(x))
    tp.close()
    with rank.form("after") as again:
        total = again.all_reduce(torch.ones(5, device=rank.device)).tolist()
    return [first, then, total]


@pytest.mark.parametrize("size", sizes(most=3))
def test_an_exception_inside_the_capture_of_one_rank_reaches_all(worlds: Worlds, size: int) -> None:
    culprit = size - 1
    with worlds.short(size, 1.5) as world:
        for rank, (first, then, total) in enumerate(world.run(fails_inside, culprit)):
            if rank == culprit:
                assert (first["error"], first["text"]) == ("ValueError", "out of luck")
            else:
                assert first["error"] in ("CaptureError", "PeerError") and "out of luck" in first["text"], first
            assert then["ours"], then
            assert total == [float(size)] * 5


def passes_through(rank: Rank) -> list[Any]:
    """A plane of which no communicator has a backend that captures."""
    with rank.plane.communicator("plain", device=str(rank.device), backends=["torch"]) as plain:
        x = torch.ones(100, device=rank.device)
        plain.all_reduce_(x)  # NCCL sets itself up
        graph = captured(rank, lambda: plain.all_reduce_(x.fill_(2.0)))
        graph.replay()
        torch.cuda.synchronize()
        del graph  # NCCL does not part with a communicator that a graph holds
        return [list(plain.plan.backends), x.tolist()[:3]]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants 2 GPUs: NCCL refuses two ranks on one")
@pytest.mark.parametrize("size", sizes(most=2))
def test_a_capture_passes_a_communicator_of_torch_alone_through(worlds: Worlds, size: int) -> None:
    with worlds.fresh(size) as world:
        for backends, shown in world.run(passes_through):
            assert backends == ["torch"] and shown == [2.0 * size] * 3


def expandable(store: Any, rank: int, world_size: int, ordinals: list[int], registered: str) -> list[Any]:
    """Memory of torch has no handles then: `auto` stages, `on` is refused."""
    assert "expandable_segments:True" in os.environ["PYTORCH_CUDA_ALLOC_CONF"]
    torch.cuda.set_device(ordinals[rank])
    device = torch.device("cuda", ordinals[rank])
    config = {"timeout": 10, "startup_timeout": 60, "custom_ar": {"registered": registered, "algorithm": "two_shot_pull"}}
    with commplane.init(store=store, rank=rank, world_size=world_size, config=config, plugins=only("custom_ar")) as plane:
        try:
            tp = plane.communicator("tp", device=str(device))
        except errors.SelectionError as error:  # where torch's own backend is no way out
            return [str(error)]
        if "custom_ar" not in tp.plan.backends:
            return [str(next(c.reason for c in tp.plan.candidates if c.name == "custom_ar"))]
        x = torch.zeros(100_000, dtype=DTYPES["bfloat16"], device=device)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with plane.capture(), torch.cuda.graph(graph):
            tp.all_reduce_(x)
        for step in range(3):
            parts = inputs(world_size, x.numel(), x.dtype, step, device)
            x.copy_(parts[rank])
            graph.replay()
            expect(step, x, reduced(parts))
        return ["right"]


@pytest.mark.parametrize("registered", ["auto", "on"])
def test_expandable_segments_are_staged_unless_registered_inputs_were_demanded(worlds: Worlds, registered: str) -> None:
    env = {**worlds.env(2), "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    ordinals = [0, 1] if torch.cuda.device_count() > 1 else [0, 0]
    outcomes = run_processes(2, expandable, ordinals, registered, env=lambda _rank: env, timeout=150)
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
        if registered == "auto":
            assert o.result == ["right"], o.result
        else:
            assert "setting registered=on" in o.result[0] and "unset expandable_segments" in o.result[0], o.result
