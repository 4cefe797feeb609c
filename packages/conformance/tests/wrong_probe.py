"""A plugin whose probe answers by rank."""

from __future__ import annotations

from typing import Any

from wrong_plugins import spec

from commplane.api import BackendSpec, Unusable, Usable, hookimpl


def probe(request: Any, _facts: Any) -> Usable | Unusable:
    return Usable() if request.rank == 0 else Unusable("only rank 0 has it")


@hookimpl
def commplane_register_comm_backends() -> list[BackendSpec]:
    return [spec("honest:Honest", probe="wrong_probe:probe")]
