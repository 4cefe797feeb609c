"""One rank of a small engine on the groups of vLLM: a tensor-parallel model that decodes greedily. Run by `run_processes`.

`live` runs on the stand-in as on the published vLLM, whichever is found first.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from commplane import Communicator
from commplane.errors import CaptureError

HIDDEN, INNER, VOCAB, STEPS, TOKENS = 32, 64, 97, 12, 64


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


def serve(store: Any, rank: int, world_size: int) -> list[dict[str, Any]]:
    """The engine without the adapter, then with it."""
    logging.basicConfig(level=logging.INFO)
    prepared, prepare = [], Communicator.prepare

    def told(self: Communicator, *args: Any, **kwargs: Any) -> None:
        prepare(self, *args, **kwargs)
        prepared.append([*args, kwargs["max_bytes"]])

    Communicator.prepare = told
    out = [live(store, rank, world_size, "without")]
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return [*out, {**live(store, rank, world_size, "with"), "prepared": prepared}]


def groups_of(parallel_state: Any, rank: int, world_size: int, backend: str = "gloo") -> tuple[Any, Any]:
    """The groups world and tp, over all ranks."""
    everyone = [list(range(world_size))]
    return (
        parallel_state.GroupCoordinator(everyone, rank, backend, use_device_communicator=False, group_name="world"),
        parallel_state.GroupCoordinator(everyone, rank, backend, use_device_communicator=True, group_name="tp"),
    )


def live(store: Any, rank: int, world_size: int, name: str) -> dict[str, Any]:
    """Make groups, capture where that is possible, decode, destroy. Returns what a test asks about."""
    import vllm.config
    from vllm.distributed import parallel_state

    # What vLLM's worker has set by then.
    vllm.config.get_current_vllm_config_or_none = lambda: SimpleNamespace(
        model_config=SimpleNamespace(get_hidden_size=lambda: HIDDEN, dtype=torch.float32),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS),
        parallel_config=SimpleNamespace(all2all_backend=None, distributed_timeout_seconds=None, cpu_distributed_timeout=None),
    )
    dist.init_process_group("gloo", store=dist.PrefixStore(name, store), rank=rank, world_size=world_size)
    calls = parallel_state.__dict__.setdefault("calls", Counter())
    calls.clear()
    world, tp = groups_of(parallel_state, rank, world_size)
    served = tp.__dict__.get("commplane_served")
    out: dict[str, Any] = {"standin": "vllm_standin" in parallel_state.__file__}
    with contextlib.ExitStack() as stack:
        if out["standin"]:  # the published one captures on CUDA devices alone
            context = stack.enter_context(tp.graph_capture())
            stack.enter_context(world.graph_capture(context))
        out["captured"] = Model(tp).decode(1)
        try:
            if served and out["standin"]:
                served.communicator.compare("a step of the control plane", {})
        except CaptureError as error:
            out["refused"] = str(error)
    x = torch.ones(5)
    out["tokens"] = Model(tp).decode(1)
    out["kept"] = [parallel_state.all_reduce(x, tp.unique_name).sum().item(), x.sum().item()]
    out["halves"] = tp.all_reduce(torch.full((3,), rank + 0.5, dtype=torch.complex64)).real.tolist()
    if not out["standin"]:
        compiled = torch.compile(lambda x: tp.all_reduce(x * 2) + 1, backend="eager", fullgraph=True)
        out["compiled"] = [compiled(torch.ones(n)).sum().item() / n for n in (4, 8, 12)]
    out["calls"] = dict(calls)
    if served:
        plan = served.communicator.plan
        out["plan"] = plan.explain("all_reduce", nbytes=HIDDEN * 4, dtype=torch.float32).chosen
    tp.destroy()
    world.destroy()
    if served:
        from commplane_vllm.plugin import groups

        out["closed"] = served.communicator.closed and groups.plane is None
    dist.destroy_process_group()
    return out
