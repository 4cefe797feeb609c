"""The registry: where the ranks of a group are, who they are, and whether all have come."""

from __future__ import annotations

from commplane_disagg.registry.auth import metrics_token, read_token
from commplane_disagg.registry.client import RegistryClient, new_instance, restarts
from commplane_disagg.registry.follower import Follower
from commplane_disagg.registry.join import Member, join
from commplane_disagg.registry.lease import Lease
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
