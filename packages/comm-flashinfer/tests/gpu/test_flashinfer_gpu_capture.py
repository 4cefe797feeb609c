"""Graphs over FlashInfer's kernels: replays with new inputs and eager calls between, what a capture refuses, the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flashinfer_gpu import (
    EPS,
    FUSED,
    Layer,
    by_flashinfer,
    check_quantised,
    formed,
    groups,
    how_to,
    marks,
    patterns,
    ready,
    serves,
    shapes,
)
from gpu_numbers import checksum, expect, inputs
from gpu_ranks import Rank, World

from commplane import errors, ops
from commplane.api.quantize import misquantized, quantize
from commplane_flashinfer.patterns import ALL_REDUCE, NORM

pytestmark = marks()

DTYPE = torch.bfloat16


def captured(rank: Rank, body: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `body`. Collective."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with rank.plane.capture(), torch.cuda.graph(graph):
        body()
    return graph


def many_replays(rank: Rank) -> list[int]:
    """A graph for each shape with a sum, a norm in and out of place, and each FP8 format; replayed in turn."""
    tp, checks = ready(rank, DTYPE), []
    n, device = rank.world_size, rank.device
    kinds = {kind: how_to(kind, device) for kind in ("fp8_static", "fp8_token", "fp8_group")}
    made = []
    for tokens, hidden in shapes(rank, DTYPE, [512, 4096], [1, 5, 130, 512]):
        layer = Layer(rank, DTYPE, tokens, hidden, 1)
        x, r = torch.zeros_like(layer.mine), torch.zeros_like(layer.before)
        places = torch.zeros_like(x), torch.zeros_like(r)
        got: dict[str, Any] = {}

        def body(x=x, r=r, places=places, got=got, weight=layer.weight) -> None:
            got["sum"] = tp.all_reduce(x)
            got["norm"] = tp.all_reduce_rms_norm(x, r, weight, EPS)
            tp.all_reduce_rms_norm_(*places, weight, EPS)
            for kind, how in kinds.items():
                got[kind] = tp.all_reduce_rms_norm_quant(x, r, weight, how, EPS, keep_norm=True)

        body()  # what is loaded at the first call of a shape is loaded outside of the capture
        for collective, op in (*((name, "sum") for name in FUSED[:2]), *((FUSED[2], kind) for kind in kinds)):
            serves(tp, collective, x.nbytes, DTYPE, op, graph=True)
        with by_flashinfer(ALL_REDUCE, NORM, *(patterns(how)[0] for how in kinds.values())):
            graph = captured(rank, body)
        made.append((tokens, hidden, x, r, places, got, layer.weight, graph))
    for step in range(4 * len(made)):
        tokens, hidden, x, r, places, got, weight, graph = made[step % len(made)]
        layer = Layer(rank, DTYPE, tokens, hidden, 1 if step < len(made) else step)
        layer.weight = weight  # that which the graph reads
        for target, source in ((x, layer.mine), (r, layer.before), (places[0], layer.mine), (places[1], layer.before)):
            target.copy_(source)
        graph.replay()
        with by_flashinfer(ALL_REDUCE):
            eager = tp.all_reduce(x)
        what = (step, tokens, hidden)
        expect((what, "sum"), got["sum"], layer.total)
        expect((what, "eager"), eager, layer.total)
        layer.check(what, *got["norm"])
        layer.check((what, "in place"), *places)
        for kind, how in kinds.items():
            quantised, norm, residual = got[kind]
            layer.check((what, kind), norm, residual)
            problem = misquantized(quantised, quantize(norm, how))
            assert problem is None, (what, kind, problem)
            checks += [checksum(quantised.values), checksum(residual)]
    # Replays with no wait between them, whose input changes in between.
    _, _, x, _, _, got, _, graph = made[0]
    for step in range(200):
        x.fill_(float(step % 50 + rank.rank))
        graph.replay()
    expect("after 200 replays", got["sum"], torch.full_like(x, float(49 * n + n * (n - 1) // 2)))
    torch.cuda.synchronize()
    return checks


@pytest.mark.parametrize("size", groups())
def test_graphs_are_replayed_in_turn_with_new_inputs_and_eager_calls_between(world: World) -> None:
    first, *others = world.run(many_replays)
    assert all(other == first for other in others)


def prepares_inside(rank: Rank) -> str:
    """What prepare says inside of a capture; the capture goes on."""
    tp = ready(rank, DTYPE)
    x = torch.ones(4096, dtype=DTYPE, device=rank.device)
    said = ""

    def body() -> None:
        nonlocal said
        try:
            tp.prepare("all_reduce", dtype=DTYPE, max_bytes=64 << 20)
        except errors.CaptureError as error:
            said = str(error)
        with by_flashinfer(ALL_REDUCE):
            tp.all_reduce_(x)

    graph = captured(rank, body)
    x.fill_(1.0)
    graph.replay()
    expect("replay", x, torch.full_like(x, float(rank.world_size)))
    return said


@pytest.mark.parametrize("size", groups(most=2))
def test_no_workspace_is_built_inside_a_capture(world: World) -> None:
    for said in world.run(prepares_inside):
        assert "inside a capture" in said, said


HIDDEN = 512


def compiled(rank: Rank, in_graph: bool) -> None:
    """Against the same function without a compiler."""
    torch._dynamo.reset()
    tp, device = ready(rank, DTYPE), rank.device
    weight = torch.full((HIDDEN,), 0.5, dtype=DTYPE, device=device)
    how = how_to("fp8_static", device)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = ops.all_reduce(x * 2.0, tp)
        norm, rest = ops.all_reduce_rms_norm(torch.relu(total), residual, weight, tp)
        quantised, _, last = ops.all_reduce_rms_norm_quant(norm, rest, weight, tp, how)
        return norm + 1.0, quantised.values.view(torch.uint8), last * 2.0

    fast = torch.compile(layer, fullgraph=True)
    x = torch.zeros(8, HIDDEN, dtype=DTYPE, device=device)
    residual = torch.ones_like(x)
    with by_flashinfer(ALL_REDUCE, NORM, patterns(how)[1]):
        for _ in range(3):
            fast(x, residual)
    torch.cuda.synchronize()
    out: Any = None
    graph = torch.cuda.CUDAGraph()
    if in_graph:
        with by_flashinfer(ALL_REDUCE, NORM, patterns(how)[1]), rank.plane.capture(), torch.cuda.graph(graph):
            out = fast(x, residual)
    for step in range(4):
        x.copy_(inputs(rank.world_size, x.numel(), x.dtype, step, device)[rank.rank].view_as(x))
        if in_graph:
            graph.replay()
        else:
            out = fast(x, residual)
        for got, wanted in zip(out, layer(x, residual), strict=True):
            expect(("compiled", step), got, wanted)
    torch.cuda.synchronize()


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "in a graph"])
@pytest.mark.parametrize("size", groups(most=2))
def test_a_compiled_function_gives_what_the_plain_one_does(world: World, in_graph: bool) -> None:
    world.run(compiled, in_graph, limit=150)


def after_a_graph(rank: Rank) -> None:
    """A call after close is refused; a new communicator over the same ranks works."""
    comm = formed(rank, "short_lived")
    layer = Layer(rank, DTYPE, 4, 1024, 4)
    with by_flashinfer(NORM):
        got = comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
    layer.check("before", *got)
    comm.close()
    with pytest.raises(errors.CommplaneError, match="closed"):
        comm.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS)
    with formed(rank, "next") as again:
        check_quantised("after", again, layer, how_to("fp8_token", rank.device))


@pytest.mark.parametrize("size", groups())
def test_a_closed_communicator_refuses_and_the_next_one_works(world: World) -> None:
    world.run(after_a_graph)
