"""A backend that has `all_reduce_rms_norm` whole, over the group's store, and gets it wrong where a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from commplane.api import (
    BackendSpec,
    BuildContext,
    Capability,
    CommBackend,
    Facts,
    ProbeRequest,
    ReduceOp,
    Requirement,
    Usable,
    Verdict,
    Workspace,
    hookimpl,
)
from commplane.plugins import PluginHost

NAME = "fused"

Norm = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def rms_norm(
    total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, as plainly as it can be written, with the rounding of `add_rms_norm`."""
    new = (total + residual).detach()
    v, scale = new, weight.detach()
    if new.dtype.itemsize < 4:
        v, scale = v.float(), scale.float()
    norm = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps) * (weight_bias + scale)
    return norm.to(new.dtype), new


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """Usable."""
    return Usable()


class Fused(CommBackend):
    """Gathers over the store, adds in rank order, and does `norm`, which a test may replace."""

    norm: Norm = staticmethod(rms_norm)

    def open(self, context: BuildContext) -> None:
        self.context = context
        self.store = context.bootstrap.store("data")
        self.calls = 0
        self.requirements: list[Requirement] = []
        context.bootstrap.barrier(what="opening")

    def close(self) -> None:
        pass

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        self.requirements.extend(requirements)
        return []

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks."""
        self.calls += 1
        keys = [f"{self.calls}/{r}" for r in range(self.context.world_size)]
        self.store.set(keys[self.context.rank], json.dumps(tensor.tolist()))
        self.store.wait(keys, timedelta(seconds=self.context.timeout))
        parts = [torch.tensor(json.loads(self.store.get(key)), dtype=tensor.dtype).reshape(tensor.shape) for key in keys]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def all_reduce_rms_norm(
        self, tensor: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return type(self).norm(self.total(tensor), residual, weight, eps, weight_bias)


class Both(Fused):
    """Has the all-reduce too."""

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        return tensor.copy_(self.total(tensor))


class Plugin:
    """What is registered with a host."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    @hookimpl
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        values: dict[str, Any] = {
            "name": NAME,
            "api": (1, 1),
            "factory": "fused:Fused",
            "probe": "fused:probe",
            "capabilities": {Capability.ALL_REDUCE_RMS_NORM},
            "dtypes": {"float32", "bfloat16"},
            "device": "cpu",
            "priority": 50,
        }
        return [BackendSpec(**{**values, **self.changes})]


def host(**changes: Any) -> PluginHost:
    """Core's plugin and this one, and nothing that is installed."""
    out = PluginHost()
    out.register(Plugin(**changes), NAME, dist="fused-wheel", version="1.0")
    return out
