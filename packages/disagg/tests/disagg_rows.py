"""Rows, topologies and servers as the registry's tests want them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from commplane_disagg.port import bind_listener
from commplane_disagg.registry import RegistryClient, RegistryServer, new_instance
from commplane_disagg.wire import Coordinate, Row, Topology

TOKEN = b"a token of the tests"

Serve = Callable[..., RegistryServer]


def topology(**changed: Any) -> Topology:
    return Topology(**{"tp": 2, "page_size": 16, "kv_dtype": "bfloat16", "layers": 4, "kv_heads": 2, "head_dim": 8, **changed})


def row(tp: int = 0, **changed: Any) -> Row:
    known = {"key": Coordinate(tp=tp), "host": "127.0.0.1", "port": 7000 + tp, "instance": new_instance()}
    return Row(**{**known, **changed})


@contextmanager
def serving() -> Iterator[Serve]:
    """A function that starts servers in this process; they are closed at the end."""
    servers = []

    def start(host: str = "127.0.0.1", *, token: bytes | None = TOKEN, lease: float = 30.0, port: int = 0, **options: Any) -> Any:
        servers.append(RegistryServer(bind_listener(host, port), token=token, lease=lease, **options).start())
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.close()


def client_of(server: RegistryServer, **options: Any) -> RegistryClient:
    return RegistryClient(server.bound.host, server.port, **{"token": TOKEN, "timeout": 10.0, **options})


def eventually(what: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
