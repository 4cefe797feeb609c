"""A backend that declares little, for an older comm API."""

from __future__ import annotations

from wrong_plugins import spec

from commplane.api import BackendSpec, Capability, Numerics, hookimpl


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    capabilities = {Capability.ALL_REDUCE, Capability.ALL_REDUCE_RMS_NORM}
    return [
        spec(
            "honest:Honest", api=(1, 0), capabilities=capabilities, dtypes={"float32"}, formats=set(), numerics=Numerics.UNORDERED
        )
    ]
