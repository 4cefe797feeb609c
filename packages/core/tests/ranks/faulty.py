"""A backend that works, and fails where a test tells it to. It reduces over the group's store."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
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
    Unusable,
    Usable,
    Verdict,
    hookimpl,
)
from commplane.plugins import PluginHost

NAME = "faulty"


@dataclass
class Fault:
    """What this rank is to do wrong, and when. One a process; threads as ranks use `rank`."""

    stage: str = ""
    how: str = ""
    rank: int = -1

    def strike(self, stage: str, rank: int) -> None:
        """Fail if this is the place."""
        if (stage, rank) != (self.stage, self.rank):
            return
        if self.how == "raise":
            raise RuntimeError(f"injected into {stage}")
        if self.how == "stall":
            time.sleep(3600)
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


FAULT = Fault()


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """Usable unless told otherwise."""
    FAULT.strike("probe", request.rank)
    if FAULT.stage == "probe" and FAULT.how == "refuse" and FAULT.rank == request.rank:
        return Unusable("injected refusal")
    return Usable()


class Faulty(CommBackend):
    """All-reduce over the store."""

    def open(self, context: BuildContext) -> None:
        self.context = context
        self.store = context.bootstrap.store("data")
        self.calls = 0
        FAULT.strike("open", context.rank)
        context.bootstrap.barrier(what="opening")

    def close(self) -> None:
        pass

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        FAULT.strike("canary", self.context.rank)
        self.calls += 1
        keys = [f"{self.calls}/{r}" for r in range(self.context.world_size)]
        self.store.set(keys[self.context.rank], json.dumps(tensor.tolist()))
        self.store.wait(keys, timedelta(seconds=self.context.timeout))
        parts = torch.tensor([json.loads(self.store.get(key)) for key in keys], dtype=tensor.dtype)
        wrong = FAULT.stage == "canary" and FAULT.how == "wrong" and FAULT.rank == self.context.rank
        return tensor.copy_(parts[0] if wrong else parts.sum(0))


class Plugin:
    """What is registered with a host."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    @hookimpl
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        values: dict[str, Any] = {
            "name": NAME,
            "api": (1, 0),
            "factory": "faulty:Faulty",
            "probe": "faulty:probe",
            "capabilities": {Capability.ALL_REDUCE},
            "dtypes": {"float32"},
            "device": "cpu",
            "priority": 50,
        }
        return [BackendSpec(**{**values, **self.changes})]


def host(version: str = "1.0", **changes: Any) -> PluginHost:
    """Core's plugin and this one, and nothing that is installed."""
    out = PluginHost()
    out.register(Plugin(**changes), NAME, dist="faulty-wheel", version=version)
    return out
