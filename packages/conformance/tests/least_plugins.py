"""A backend for large messages."""

from __future__ import annotations

from wrong_plugins import spec

from commplane.api import BackendSpec, hookimpl


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    return [spec("honest:Honest", min_bytes=1 << 20)]
