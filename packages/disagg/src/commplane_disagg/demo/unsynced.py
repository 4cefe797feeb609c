"""How prefill ranks registered upstream before its port sync: each node's ranks at that node's own port.

Kept to show what `commplane_disagg.port.sync_bootstrap_port` is for: the registry listens on the first node alone, at its port.
"""

from __future__ import annotations

from commplane_disagg.port import BoundSocket
from commplane_disagg.registry import Lease, Member, RegistryClient, RegistryServer
from commplane_disagg.wire import Row, Topology

__all__ = ["UNSYNCED_SECONDS", "join_unsynced"]

UNSYNCED_SECONDS = 3.0
"""To register, and until all ranks are there: nothing that is missing will come later."""


def join_unsynced(
    topology: Topology,
    row: Row,
    *,
    port: int,
    leads: bool,
    registry_host: str,
    bound: BoundSocket | None,
    token: bytes | None,
    timeout: float,
) -> Member:
    """`commplane_disagg.registry.join` without the port sync: `port` is what this rank's own node has bound. Local.

    Raises:
        PeerError: nothing listens at that port of the first node; on the first node: ranks are missing, and named.
    """
    server = RegistryServer(bound, token=token).start() if leads and bound is not None else None
    client = RegistryClient(registry_host, port, token=token, timeout=min(timeout, UNSYNCED_SECONDS))
    lease: Lease | None = None
    try:
        lease = Lease(client, topology, row)
        return Member(port, client, lease, client.wait_ready(), server)
    except BaseException:
        if lease is not None:
            lease.close()
        client.close()
        if server is not None:
            server.close()
        raise
    finally:
        if bound is not None and server is None:
            bound.close()
