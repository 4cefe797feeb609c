"""Start-up of one rank, in the order in which nothing can be missed: bind, serve, agree on the port, register, all are there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from commplane.errors import CommplaneError
from commplane_disagg.port import BoundSocket, SyncsBootstrap, sync_bootstrap_port
from commplane_disagg.registry.client import RegistryClient
from commplane_disagg.registry.lease import Lease
from commplane_disagg.wire import Row, TableView, Topology

if TYPE_CHECKING:
    from commplane_disagg.registry.server import RegistryServer

__all__ = ["Member", "join"]


@dataclass
class Member:
    """A rank that has joined.

    Attributes:
        port: of the registry, the same on every rank.
        client: of the group.
        lease: keeps this rank's row.
        table: all rows, as they were when the group was ready.
        server: the registry, on the rank that serves it.
    """

    port: int
    client: RegistryClient
    lease: Lease
    table: TableView
    server: RegistryServer | None

    def close(self, linger: float = 5.0) -> None:
        """Withdraw. The rank that serves waits up to `linger` seconds for the others to have withdrawn, too. Idempotent."""
        self.lease.close()
        if self.server is not None:
            self.server.drain(linger)
        self.client.close()
        if self.server is not None:
            self.server.close()

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def join(
    topology: Topology,
    row: Row,
    *,
    registry_host: str,
    bound: BoundSocket | None,
    token: bytes | None,
    plane: SyncsBootstrap | None = None,
    torch_group: Any = None,
    nnodes: int | None = None,
    group: str = "prefill",
    lease: float = 10.0,
    timeout: float = 60.0,
    peer_address: bool = False,
) -> Member:
    """Join the group of `topology`. Collective over the ranks of the plane or torch group, which are all ranks of the grid.

    A rank that fails to serve tells the others through the port sync, so that they raise at once. One that leaves again is
    missing for those that still wait for the group: meet, or have work, before `Member.close`.

    Args:
        topology: equal on all ranks.
        row: this rank's; its channel listens already.
        registry_host: address of rank 0's machine, as the others reach it.
        bound: this rank's listening socket for the registry; rank 0 needs one. That of another rank is closed, not used.
        token: the shared one (`read_token`), None for no authentication.
        plane: to agree on the port; see `sync_bootstrap_port`.
        torch_group: to agree on the port, where there is no plane.
        nnodes: number of nodes; with 1 nothing is communicated, and this rank serves on `bound`: for a single process.
        group: of the rows.
        lease: seconds that a row lives without renewal.
        timeout: seconds for the port, for the registration, and until all ranks are there, each.
        peer_address: put the address the registry sees in the place of a wildcard or loopback host of the row.

    Raises:
        RuntimeError: there is nothing to agree over; see `sync_bootstrap_port`.
        CommplaneError: of the first step that failed; what was opened is closed again.
    """
    server: RegistryServer | None = None
    client: RegistryClient | None = None
    held: Lease | None = None
    try:
        if bound is not None and (nnodes == 1 or _leads(plane, torch_group)):
            from commplane_disagg.registry.server import RegistryServer

            try:
                server = RegistryServer(bound, token=token, lease=lease).start()
            except CommplaneError:
                if nnodes != 1:
                    with contextlib.suppress(CommplaneError):  # it says on all ranks that rank 0 has no port; here is why
                        sync_bootstrap_port(None, plane=plane, group=torch_group, nnodes=nnodes, timeout=timeout)
                raise
        here = bound.port if bound is not None else None
        port = sync_bootstrap_port(here, plane=plane, group=torch_group, nnodes=nnodes, timeout=timeout)
        client = RegistryClient(registry_host, port, token=token, group=group, timeout=timeout)
        held = Lease(client, topology, row, peer_address=peer_address)
        return Member(port, client, held, client.wait_ready(timeout), server)
    except BaseException:
        if held is not None:
            held.close()
        if client is not None:
            client.close()
        if server is not None:
            server.close()
        raise
    finally:
        if bound is not None and server is None:
            bound.close()


def _leads(plane: SyncsBootstrap | None, torch_group: Any) -> bool:
    if plane is not None:
        return plane.rank == 0
    try:
        import torch.distributed as dist
    except ImportError:
        return False  # nothing to agree over: the port sync says what to do
    return dist.is_available() and dist.is_initialized() and dist.get_rank(torch_group) == 0
