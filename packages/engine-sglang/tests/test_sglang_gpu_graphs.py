"""The adapter on GPUs, in the stand-in with SGLang's seams: graphs that the engine captures hold sums of ours and of its own."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sglang_job import group, load

from commplane.testing import run_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(170),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="wants 2 CUDA devices, because NCCL takes one rank a device"),
]

HIDDEN = 4096
ROWS = (1, 64, 16384)  # 8 KiB, 512 KiB and 128 MiB of bfloat16


def graphs(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Capture each size, replay it with new contents and eager sums between. Returns what is wrong, and who summed."""
    torch.cuda.set_device(rank)
    load()
    importlib.import_module("sglang.srt.model_executor.runner.base_runner")
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_executor.runner.base_runner import BaseRunner

    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.PrefixStore("engine", store), rank=rank, world_size=world_size)
    everyone = [list(range(world_size))]
    world, tp = (group(parallel_state, name, everyone, "nccl") for name in ("world", "tp"))
    served = tp.__dict__["commplane_served"]
    BaseRunner(SimpleNamespace(model_config=SimpleNamespace(hidden_size=HIDDEN), dtype=torch.bfloat16)).warmup()
    ins = [torch.zeros(rows, HIDDEN, dtype=torch.bfloat16, device="cuda") for rows in ROWS]
    outs = [tp.all_reduce(x) for x in ins]  # NCCL starts up outside of a graph
    captured = []
    with tp.graph_capture() as context:
        for i, x in enumerate(ins):
            tp.all_reduce(torch.zeros_like(x))  # a warm-up run, as engines make before each graph
            captured.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(captured[-1], stream=context.stream):
                outs[i] = tp.all_reduce(x)
    wrong = []
    for step in range(6):
        for i, x in enumerate(ins):
            wanted = float(sum(r + step for r in range(world_size)))
            x.fill_(float(rank + step))
            captured[i].replay()
            if not bool((outs[i] == wanted).all()):
                wrong.append(f"step {step}, {ROWS[i]} rows: wanted {wanted}, found {outs[i].unique().tolist()[:4]}")
            eager = tp.all_reduce(torch.full_like(x, float(rank + step)))
            if not bool((eager == wanted).all()):
                wrong.append(f"step {step}, {ROWS[i]} rows, eager: wanted {wanted}, found {eager.unique().tolist()[:4]}")
    past = torch.cuda.CUDAGraph()  # captured past the groups, as engines do for an image encoder: none of ours is in it
    x = torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(past):
        out = tp.all_reduce(x)
    for step in range(2):
        x.fill_(float(rank + step))
        past.replay()
        if not bool((out == float(sum(r + step for r in range(world_size)))).all()):
            wrong.append(f"step {step}, past the groups: found {out.unique().tolist()[:4]}")
    torch.cuda.synchronize()
    ours = [served.takes(x, capturing) for x in ins for capturing in (False, True)]
    said = {"wrong": wrong, "plan": str(served.communicator.plan), "own": parallel_state.calls["own"], "ours": ours}
    del captured, outs, past, out
    tp.destroy()
    world.destroy()
    dist.destroy_process_group()
    return {**said, "closed": served.communicator.closed}


def test_graphs_of_the_engine_are_replayed_with_eager_calls_between(monkeypatch, tmp_path):
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path))
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent / "sglang_standin"), os.environ.get("PYTHONPATH", "")]))
    env = {"PYTHONPATH": path, "SGLANG_PLUGINS": "commplane", "COMMPLANE_TIMEOUT": "60"}
    outcomes = run_processes(2, graphs, env=lambda _: env, timeout=150)
    assert all(o.returncode == 0 for o in outcomes), "\n".join(f"{o.error}: {o.message}\n{o.output[-3000:]}" for o in outcomes)
    first, second = (o.result for o in outcomes)
    print(first["plan"])
    assert first == second and first["wrong"] == [] and first["closed"]
    # The smallest is ours, eager and in a graph; a size is summed by the engine itself exactly where the plan has torch.
    assert first["ours"][:2] == [True, True]
    eager, graphed = first["ours"][::2], first["ours"][1::2]
    # For each size: the first sum and six between replays are eager, the warm-up and the graph are in the capture.
    # The graph past the groups has one sum, which is the engine's own whatever the plan says.
    assert first["own"] == 1 + sum(7 * (not e) + 2 * (not g) for e, g in zip(eager, graphed, strict=True))
