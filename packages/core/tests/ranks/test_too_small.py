"""`WorkspaceTooSmall` is raised before anything is sent, so unlike other errors of a call it ends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import fused
import pytest
import torch

from commplane.api import BackendSpec, Capability, Requirement, Workspace, hookimpl
from commplane.errors import WorkspaceTooSmall
from commplane.plugins import PluginHost
from commplane.testing import run_threads


class Grows(fused.Fused):
    """Has room for what the canary sends, until `prepare`."""

    room = 4096

    def init_workspace(self, requirements: Sequence[Requirement]) -> list[Workspace]:
        self.room = max(r.max_bytes for r in requirements)
        return []

    def all_reduce_rms_norm(self, tensor: torch.Tensor, *rest: Any) -> Any:
        if tensor.nbytes > self.room:
            raise WorkspaceTooSmall(f"wanted {tensor.nbytes} bytes, found {self.room}: call prepare() before")
        return super().all_reduce_rms_norm(tensor, *rest)


def host() -> PluginHost:
    """Core's plugin, and `grows`."""

    class Plugin:
        @hookimpl
        def commplane_register_comm_backends(self) -> list[BackendSpec]:
            (spec,) = fused.Plugin(name="grows", capabilities={Capability.ALL_REDUCE_RMS_NORM}).commplane_register_comm_backends()
            return [spec]

        @hookimpl
        def commplane_build_communicator(self, spec: BackendSpec, context: Any) -> Any:
            return Grows() if spec.name == "grows" else None

    made = PluginHost()
    made.register(Plugin(), "grows")
    return made


@pytest.mark.timeout(60)
def test_a_communicator_goes_on_after_a_call_that_wanted_a_larger_workspace() -> None:
    def rank(plane: Any) -> list[float]:
        with plane.communicator("tp") as comm:
            x = torch.ones(20, 256)
            for _ in range(2):
                with pytest.raises(WorkspaceTooSmall, match="wanted 20480 bytes, found 4096"):
                    comm.all_reduce_rms_norm(x, x, x[0])
            small = comm.all_reduce_rms_norm(x[:2], x[:2], x[0])[1]
            comm.prepare("all_reduce_rms_norm", dtype="float32", max_bytes=x.nbytes)
            return [float(small.max()), float(comm.all_reduce_rms_norm(x, x, x[0])[1].max())]

    assert run_threads(2, rank, plugins=lambda _r: host(), timeout=40) == [[3.0, 3.0]] * 2
