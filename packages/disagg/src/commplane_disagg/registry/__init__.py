"""The registry: where the ranks of a group are, who they are, and whether all have come.

The server's libraries are loaded when it is used: most ranks only ask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commplane_disagg.registry.auth import metrics_token, read_token
from commplane_disagg.registry.client import RegistryClient, new_instance, restarts
from commplane_disagg.registry.follower import Follower
from commplane_disagg.registry.join import Member, join
from commplane_disagg.registry.lease import Lease

if TYPE_CHECKING:
    from commplane_disagg.registry.server import RegistryServer

__all__ = [
    "Follower",
    "Lease",
    "Member",
    "RegistryClient",
    "RegistryServer",
    "join",
    "metrics_token",
    "new_instance",
    "read_token",
    "restarts",
]


def __getattr__(name: str) -> Any:
    if name == "RegistryServer":
        from commplane_disagg.registry.server import RegistryServer

        return RegistryServer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
