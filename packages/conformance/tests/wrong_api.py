"""A plugin whose API number is the host's, so that the check of versions can never fail."""

from __future__ import annotations

from wrong_plugins import spec

import commplane.api
from commplane.api import BackendSpec, hookimpl


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    return [spec("honest:Honest", api=commplane.api.COMM_API)]
