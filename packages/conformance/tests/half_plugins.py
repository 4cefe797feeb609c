"""A backend for float16 messages of a few kilobytes."""

from __future__ import annotations

from wrong_plugins import spec

from commplane.api import BackendSpec, Capability, hookimpl


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    return [
        spec(
            "honest:Honest",
            capabilities={Capability.ALL_REDUCE},
            formats=set(),
            dtypes={"float16"},
            min_bytes=4096,
            max_bytes=8192,
        )
    ]
