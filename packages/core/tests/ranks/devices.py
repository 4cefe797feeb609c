"""A plugin with one backend name for two types of device, and backends that choose sizes for themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from commplane.api import BackendSpec, BuildContext, CommBackend, Facts, ProbeRequest, ReduceOp, Usable
from commplane.api import hookimpl as marked
from commplane.plugins import PluginHost


def usable(request: ProbeRequest, facts: Facts) -> Usable:
    return Usable({"options": ",".join(sorted(request.options))})


class Gathering(CommBackend):
    """Sums through a process group of Gloo."""

    def open(self, context: BuildContext) -> None:
        self.context = context
        self.group = torch.distributed.ProcessGroupGloo(context.bootstrap.store("gather"), context.rank, context.world_size)

    def close(self) -> None:
        self.group = None

    def all_reduce_(self, tensor: torch.Tensor, op: ReduceOp) -> torch.Tensor:
        self.group.allreduce([tensor]).wait()
        return tensor


def spec(name: str = "twin", device: str = "cpu", **changes: Any) -> BackendSpec:
    values: dict[str, Any] = {
        "name": name,
        "api": (1, 0),
        "factory": "devices:Gathering",
        "probe": "devices:usable",
        "capabilities": {"all_reduce"},
        "dtypes": {"float32"},
        "device": device,
        "priority": 10,
    }
    return BackendSpec(**(values | changes))


Ranges = Callable[..., Any]


class Plugin:
    """Registers `specs`; what it builds for `twin` answers `ranges` when asked for sizes."""

    def __init__(self, *specs: BackendSpec, ranges: Ranges | None = None) -> None:
        self.specs = specs
        self.ranges = ranges

    @marked
    def commplane_register_comm_backends(self) -> list[BackendSpec]:
        return list(self.specs)

    @marked
    def commplane_build_communicator(self, spec: BackendSpec, context: BuildContext) -> CommBackend | None:
        if spec.name == "torch" or self.ranges is None:
            return None
        backend = Gathering()
        backend.ranges = self.ranges  # type: ignore[method-assign]
        return backend


def host(*specs: BackendSpec, ranges: Ranges | None = None) -> PluginHost:
    made = PluginHost()
    made.register(Plugin(*specs, ranges=ranges), "twins", dist="twins-wheel")
    return made
