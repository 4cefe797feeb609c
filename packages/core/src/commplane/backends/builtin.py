"""Core's own plugin: the backends that torch brings, and the last word of every hook that needs one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from commplane.api import (
    BackendSpec,
    Bootstrap,
    BuildContext,
    Capability,
    CommBackend,
    Facts,
    ProbeRequest,
    Requirement,
    Unusable,
    Usable,
    Verdict,
    Workspace,
    hookimpl,
)

__all__ = [
    "commplane_build_communicator",
    "commplane_init_workspace",
    "commplane_register_comm_backends",
    "commplane_sync_bootstrap",
    "probe",
]


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """Torch has to be installed; everything else is its own business."""
    if importlib.util.find_spec("torch") is None:
        return Unusable("torch is not installed: pip install commplane[torch]")
    return Usable()


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    """`torch`: every collective, any device, always last in a plan. `torch_symm`: where it is asked for by name.

    `hierarchical`: all-reduce for groups that span hosts, made of other backends inside the hosts and between them.
    """
    return [
        BackendSpec(
            name="torch",
            api=(1, 0),
            factory="commplane.backends.torch_dist:TorchDistributed",
            probe="commplane.backends.builtin:probe",
            capabilities={
                Capability.ALL_REDUCE,
                Capability.ALL_GATHER,
                Capability.REDUCE_SCATTER,
                Capability.BROADCAST,
                Capability.BARRIER,
            },
            # What both Gloo and NCCL reduce.
            dtypes={"float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64"},
            ops={"sum", "min", "max", "avg"},
            device="any",
            min_world_size=1,
        ),
        BackendSpec(
            name="hierarchical",
            api=(1, 4),
            factory="commplane.backends.hierarchical.backend:Hierarchical",
            probe="commplane.backends.hierarchical.probe:probe",
            capabilities={Capability.ALL_REDUCE},
            dtypes={"float16", "bfloat16", "float32", "float64", "int8", "uint8", "int32", "int64"},
            ops={"sum", "min", "max", "avg"},
            device="cpu",
            min_world_size=3,
            priority=50,
            options={
                # Backends inside the hosts and between them, in the order of preference; auto for that of priority.
                "inside": "auto",
                "between": "auto",
                # auto, leaders or shards.
                "algorithm": "auto",
                # Seconds that a rank which another one waited for in vain has to answer, before it is named as lost.
                "patience": 5.0,
            },
        ),
        BackendSpec(
            name="torch_symm",
            api=(1, 2),
            factory="commplane.backends.torch_symm:TorchSymmetricMemory",
            probe="commplane.backends.symm_probe:probe",
            capabilities={Capability.ALL_REDUCE, Capability.SYMMETRIC_MEMORY, Capability.CAPTURE},
            dtypes={"float32", "bfloat16"},
            device="cuda",
            max_world_size=8,
            priority=-1,  # only where it is asked for: its waits have no deadline
            options={
                # auto, one_shot or two_shot.
                "algorithm": "auto",
                # Most bytes of staging a rank; larger messages go through it in pieces. `prepare` builds what is needed of it.
                "max_bytes": 64 << 20,
            },
        ),
    ]


@hookimpl(trylast=True)
def commplane_sync_bootstrap(bootstrap: Bootstrap, value: Any) -> Any:
    """The leader's value."""
    return bootstrap.broadcast(value, src=0, what="bootstrap sync")


@hookimpl(trylast=True)
def commplane_build_communicator(spec: BackendSpec, context: BuildContext) -> CommBackend:
    """Import the factory of `spec` and call it."""
    module, _, attribute = spec.factory.partition(":")
    backend = getattr(importlib.import_module(module), attribute)()
    if not isinstance(backend, CommBackend):
        raise TypeError(f"{context.who} factory {spec.factory!r} must give a CommBackend, found {type(backend).__name__}")
    return backend


@hookimpl
def commplane_init_workspace(communicator: Any, requirements: Sequence[Requirement]) -> list[Workspace]:
    """Ask each backend of the plan, in its order; if one raises, what the ones before it built is closed."""
    built: list[Workspace] = []
    try:
        for backend in communicator.backends:
            built.extend(backend.init_workspace(requirements))
    except BaseException:
        for workspace in built:
            workspace.close()
        raise
    return built
