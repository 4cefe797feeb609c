"""Functions compiled with fullgraph=True that call commplane.ops between operations of torch: eager, and in a captured graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_numbers import expect, inputs
from gpu_ranks import Rank, World, needs_gpu, sizes

from commplane import ops

pytestmark = needs_gpu()

HIDDEN = 256


def compiled(rank: Rank, mode: str | None, in_graph: bool) -> int:
    """Against the same function without a compiler; both use the same sums, so the difference is what inductor fuses."""
    torch._dynamo.reset()
    tp, device = rank.comm(), rank.device
    weight = torch.full((HIDDEN,), 0.5, dtype=torch.bfloat16, device=device)

    def layer(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = ops.all_reduce(x * 2.0, tp)
        norm, rest = ops.all_reduce_rms_norm(torch.relu(total), residual, weight, tp)
        return norm + 1.0, rest * 2.0

    fast = torch.compile(layer, fullgraph=True, mode=mode)
    x = torch.zeros(8, HIDDEN, dtype=torch.bfloat16, device=device)
    residual = torch.ones_like(x)
    for _ in range(3):  # compiles, and with "reduce-overhead" records its own graph
        fast(x, residual)
    torch.cuda.synchronize()
    out: Any = None
    graph = torch.cuda.CUDAGraph()
    if in_graph:
        with rank.plane.capture(), torch.cuda.graph(graph):
            out = fast(x, residual)
    for step in range(4):
        x.copy_(inputs(rank.world_size, x.numel(), x.dtype, step, device)[rank.rank].view_as(x))
        if in_graph:
            graph.replay()
        else:
            out = fast(x, residual)
        for got, wanted in zip(out, layer(x, residual), strict=True):
            expect((mode, step), got, wanted)
    torch.cuda.synchronize()
    return 1


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "in a graph"])
@pytest.mark.parametrize("size", sizes(most=2))
def test_a_compiled_function_sums_as_the_plain_one_does(world: World, in_graph: bool) -> None:
    world.run(compiled, None, in_graph, limit=150)


@pytest.mark.parametrize("size", sizes(most=2))
def test_graphs_that_the_compiler_makes_by_itself_hold_the_sums_too(world: World) -> None:
    world.run(compiled, "reduce-overhead", False, limit=150)
