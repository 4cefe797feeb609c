"""The registry's port: bound first and kept, then the same on every rank.

A launcher that reserves a port by binding it, reading its number and closing it again holds nothing: another process may take the
port, and each host reserves a number of its own. Here the listening socket exists before its number is told to anybody, and what
is told is the leader's.
"""

from __future__ import annotations

import logging
import socket
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol

from commplane.errors import ConfigError, PeerError

__all__ = ["BoundSocket", "SyncsBootstrap", "bind_listener", "sync_bootstrap_port"]

_log = logging.getLogger("commplane_disagg")

_BACKLOG = 4096
"""Connections that may wait to be accepted; the kernel cuts it to net.core.somaxconn. All ranks of a job connect at once."""


class SyncsBootstrap(Protocol):
    """What is used of a plane (`commplane.init`)."""

    @property
    def rank(self) -> int:
        """Global rank."""

    def sync_bootstrap(self, value: Any) -> Any:
        """One value made equal on all ranks through the hook ``commplane_sync_bootstrap``. Collective."""


class BoundSocket:
    """A listening socket and its address. Whoever holds it closes it; connections that come before somebody accepts wait."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.host: str = sock.getsockname()[0]
        self.port: int = sock.getsockname()[1]

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def close(self) -> None:
        """Give the port back. Idempotent."""
        self.socket.close()

    def __enter__(self) -> BoundSocket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def bind_listener(host: str = "0.0.0.0", port: int = 0) -> BoundSocket:
    """Bind and listen. Local.

    Args:
        host: an IPv4 or IPv6 address or a name; ``"::"`` takes IPv4 too.
        port: 0 takes a free one; `BoundSocket.port` tells which.

    Raises:
        ConfigError: no such address here, or the port is taken.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise ConfigError(f"cannot listen on {where}: a port is 0 to 65535, 0 takes a free one")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:  # ValueError: "a..b", or a label of more than 63 characters
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot listen on {where}: {why}; give an address of this machine") from error
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for connections in TIME_WAIT
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        hint = "choose another port, or 0 for a free one" if host in ("", "0.0.0.0", "::") else "choose another address or port"
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}; {hint}") from error
    return BoundSocket(sock)


def sync_bootstrap_port(
    bound_port: int | None,
    *,
    plane: SyncsBootstrap | None = None,
    group: Any = None,
    nnodes: int | None = None,
    timeout: float = 60.0,
) -> int:
    """The registry's port on every rank: the one that rank 0 has bound. Collective, unless `nnodes` is 1.

    Call it when the socket is bound, and before anything registers. A port of this rank that differs is logged once with both
    values; its socket can be closed, the registry listens on rank 0.

    Args:
        bound_port: of this rank's listening socket; None on a rank that has none (never rank 0).
        plane: goes through its hook ``commplane_sync_bootstrap``; rank 0 of the plane leads. Its own deadline holds.
        group: without a plane: a group of torch.distributed, the default group if None; its first rank leads.
        nnodes: number of nodes, equal on every rank: 1 returns the local port without communication; None says that it is not
            known, and the ranks communicate.
        timeout: seconds until a missing leader is a `PeerError`, without a plane.

    Raises:
        RuntimeError: there are several nodes, no plane, and torch.distributed is not initialised.
        ConfigError: rank 0, or on a single node this rank, has no bound port; on all ranks alike.
        PeerError: the leader is missing.
    """
    if nnodes is not None and nnodes < 1:
        raise ConfigError(f"sync_bootstrap_port wants nnodes of at least 1, found {nnodes}")
    if nnodes == 1:
        if bound_port is None or not 1 <= bound_port <= 65535:
            raise ConfigError(f"on a single node each rank wants the bound port, found {bound_port}: call bind_listener first")
        return bound_port
    if plane is not None:
        port, rank = plane.sync_bootstrap(bound_port), plane.rank
    else:
        port, rank = _broadcast(bound_port, group, nnodes, timeout)
    # What the leader said is judged after the exchange, so that all ranks raise and none waits for one that did.
    if not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535:
        raise ConfigError(f"rank 0 has no bound port, found {port!r}: it has to call bind_listener before sync_bootstrap_port")
    if bound_port is not None and bound_port != port:
        _log.info("bootstrap port of rank %d: %d is bound here, rank 0's %d is used", rank, bound_port, port)
    return port


def _broadcast(port: int | None, group: Any, nnodes: int | None, timeout: float) -> tuple[int, int]:
    """The first rank's port (0 for none) and this process's global rank."""
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        raise RuntimeError(_not_initialised(nnodes)) from error
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(_not_initialised(nnodes))
    # A group that has no backend for CPU (NCCL alone) wants the number on its device.
    devices = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    device = torch.device("cpu") if "cpu" in devices or not devices else torch.device(next(iter(devices)))
    value = torch.tensor([port or 0], dtype=torch.int64, device=device)
    leader = dist.get_process_group_ranks(group)[0]
    try:
        work = dist.broadcast(value, src=leader, group=group, async_op=True)
        if work is not None:
            work.wait(timedelta(seconds=timeout))
        return int(value.item()), dist.get_rank()
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        raise PeerError(f"no bootstrap port came from rank {leader} within {timeout:g} s: {cause}", [leader]) from error


def _not_initialised(nnodes: int | None) -> str:
    nodes = "an unknown number of" if nnodes is None else str(nnodes)
    return (
        f"the bootstrap port of {nodes} nodes wants torch.distributed initialised before prefill ranks register, it is not: "
        "call torch.distributed.init_process_group or pass plane=commplane.init() first, or nnodes=1 for a single node"
    )
