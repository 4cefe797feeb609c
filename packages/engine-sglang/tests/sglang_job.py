"""One rank of a small engine on the stand-in: a tensor-parallel model that decodes greedily. Run by `run_processes`."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from commplane.errors import CaptureError, CommplaneError

HIDDEN, INNER, VOCAB, STEPS = 32, 64, 97, 12
TOKENS = 64  # the stand-in's largest prefill


class Model:
    """Embedding, two MLPs cut over the ranks of `group`, and the embedding again. Weights are whole numbers: sums are exact."""

    def __init__(self, group: Any) -> None:
        draw = torch.Generator().manual_seed(7)
        self.group = group
        self.embedding = torch.randint(-3, 4, (VOCAB, HIDDEN), generator=draw).float()
        mine = slice(group.rank_in_group * INNER // group.world_size, (group.rank_in_group + 1) * INNER // group.world_size)
        self.layers = []
        for _ in range(2):
            up = torch.randint(-3, 4, (INNER, HIDDEN), generator=draw).float()
            down = torch.randint(-3, 4, (HIDDEN, INNER), generator=draw).float()
            self.layers.append((up[mine], down[:, mine]))

    def step(self, token: int, state: torch.Tensor) -> tuple[int, torch.Tensor]:
        x = self.embedding[token] + state
        for up, down in self.layers:
            x = torch.remainder(x + self.group.all_reduce(torch.relu(x @ up.T) @ down.T), 17.0)
        return int((x @ self.embedding.T).argmax()), x

    def decode(self, token: int) -> list[int]:
        out, state = [], torch.zeros(HIDDEN)
        for _ in range(STEPS):
            token, state = self.step(token, state)
            out.append(token)
        return out


def world_of(store: Any, rank: int, world_size: int, name: str) -> Any:
    """A default group, and the module of groups."""
    logging.basicConfig(level=logging.INFO)
    from sglang.srt.distributed import parallel_state

    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world_size)
    return parallel_state


def load() -> None:
    """What SGLang does first in each of its processes."""
    from sglang.srt.plugins import load_plugins

    load_plugins()


def group(parallel_state: Any, name: str, ranks: list[list[int]], backend: str = "gloo") -> Any:
    """A group without any of the engine's own communicators, whose switches differ from version to version."""
    parameters = inspect.signature(parallel_state.GroupCoordinator.__init__).parameters.values()
    off = {p.name: False for p in parameters if p.name.startswith("use_") and p.default is p.empty}
    return parallel_state.GroupCoordinator(
        group_ranks=ranks, local_rank=dist.get_rank(), torch_distributed_backend=backend, group_name=name, **off
    )


def serve(store: Any, rank: int, world_size: int) -> list[dict[str, Any]]:
    """The engine without the adapter, then with it, then with groups made once more in the same default group."""
    out = [life(world_of(store, rank, world_size, "without"), rank, world_size)]
    dist.destroy_process_group()
    load()
    importlib.import_module("sglang.srt.model_executor.runner.base_runner")  # SGLang's scheduler has it before it makes groups
    parallel_state = world_of(store, rank, world_size, "with")
    out += [life(parallel_state, rank, world_size), life(parallel_state, rank, world_size)]
    dist.destroy_process_group()
    return out


def life(parallel_state: Any, rank: int, world_size: int) -> dict[str, Any]:
    """Make groups, prepare, capture, decode, destroy. Returns what a test asks about."""
    parallel_state.calls.clear()
    world = group(parallel_state, "world", [list(range(world_size))])
    tp = group(parallel_state, "tp", [list(range(world_size))])
    pp = group(parallel_state, "pp", [[r] for r in range(world_size)])
    served = tp.__dict__.get("commplane_served")
    prepared: list[Any] = []
    if served:
        prepare = served.communicator.prepare
        served.communicator.prepare = lambda *a, **k: prepare(*a, **k) or prepared.append([*a, k["max_bytes"]])
    from sglang.srt.model_executor.runner.base_runner import BaseRunner

    runner = BaseRunner(SimpleNamespace(model_config=SimpleNamespace(hidden_size=HIDDEN), dtype=torch.float32))
    runner.warmup()
    model = Model(tp)
    refused = ""
    with tp.graph_capture() as context, pp.graph_capture(context):
        captured = model.decode(1)
        try:
            if served:
                served.communicator.compare("a step of the control plane", {})
        except CaptureError as error:
            refused = str(error)
    out = {
        "captured": captured,
        "refused": refused,
        "tokens": model.decode(1),
        "halves": tp.all_reduce(torch.full((3,), rank + 0.5, dtype=torch.complex64)).real.tolist(),
        "kept": kept(tp),
        "calls": dict(parallel_state.calls),
        "prepared": prepared,
        "world": "commplane_served" in world.__dict__,
    }
    if served:
        from commplane_sglang.plugin import groups

        nbytes = HIDDEN * 4
        out["plan"] = served.communicator.plan.explain("all_reduce", nbytes=nbytes, dtype=torch.float32).chosen
        out["ours"] = [served.takes(torch.empty(8, dtype=d), False) for d in (torch.float32, torch.bfloat16, torch.complex64)]
    for each in (tp, pp, world):
        each.destroy()
    if served:
        out["closed"] = served.communicator.closed and groups.plane is None
    return out


def halves(store: Any, rank: int, world_size: int) -> list[Any]:
    """Two tensor-parallel groups side by side, as with two pipeline stages or replicas."""
    load()
    parallel_state = world_of(store, rank, world_size, "halves")
    world = group(parallel_state, "world", [list(range(world_size))])
    tp = group(parallel_state, "tp", [[0, 1], [2, 3]])
    pp = group(parallel_state, "pp", [[0, 2], [1, 3]])
    with tp.graph_capture() as context, pp.graph_capture(context):
        captured = Model(tp).decode(1)
    out = [list(tp.__dict__["commplane_served"].communicator.ranks), Model(tp).decode(1) == captured]
    out.append(tp.all_reduce(torch.tensor([float(rank)])).item())
    for each in (tp, pp, world):
        each.destroy()
    dist.destroy_process_group()
    return out


def kept(tp: Any) -> list[bool]:
    """Whether SGLang's operators keep what they promise: one leaves its input as it was, the other returns nothing new."""
    x = torch.ones(5)
    out = tp._all_reduce_out_place(x, "auto")
    y = torch.ones(5)
    return [x.sum().item() == 5, out.sum().item() == 10, tp._all_reduce_in_place(y) is None, y.sum().item() == 10]


def refused(store: Any, rank: int, world_size: int) -> list[str]:
    """The first group where rank 1 has not loaded the adapter, then where it has, for an engine that it does not know."""
    out = []
    for name, seconds in (("absent", "1.5"), ("refused", "60")):
        os.environ["COMMPLANE_TIMEOUT"] = seconds
        if rank == 0 or name == "refused":
            load()
        parallel_state = world_of(store, rank, world_size, name)
        try:
            group(parallel_state, "world", [list(range(world_size))])
            out.append("started")
        except CommplaneError as error:
            out.append(f"{type(error).__name__}: {error}")
        dist.destroy_process_group()
    return out


def published(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    """The published SGLang's groups on CPU, without the adapter and with it; what wants a GPU or a model is left out."""
    everyone = [list(range(world_size))]
    parallel_state = world_of(store, rank, world_size, "without")
    tp = group(parallel_state, "tp", everyone)
    alone = Model(tp).decode(1)
    tp.destroy()
    dist.destroy_process_group()
    load()
    parallel_state = world_of(store, rank, world_size, "with")
    world, tp = group(parallel_state, "world", everyone), group(parallel_state, "tp", everyone)
    served = tp.__dict__["commplane_served"]
    with tp.graph_capture():
        captured = Model(tp).decode(1)
    compiled = torch.compile(lambda x: tp.all_reduce(x * 2) + 1, backend="eager", fullgraph=True)
    out = {
        "tokens": Model(tp).decode(1),
        "captured": captured,
        "compiled": [compiled(torch.ones(n)).sum().item() / n for n in (4, 8, 12)],
        "kept": kept(tp),
        "backends": served.communicator.plan.backends,
    }
    tp.destroy()
    world.destroy()
    dist.destroy_process_group()
    return {**out, "alone": alone, "closed": served.communicator.closed, "file": parallel_state.__file__}
