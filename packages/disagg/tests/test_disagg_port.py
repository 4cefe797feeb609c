"""Binding first, and one port on all ranks: threads with a plane, processes over gloo."""

from __future__ import annotations

import logging
import socket
from datetime import timedelta
from typing import Any

import pytest

from commplane.api import Bootstrap, hookimpl
from commplane.errors import CommplaneError, ConfigError
from commplane.testing import PluginHost, run_processes, run_threads
from commplane_disagg.port import BoundSocket, bind_listener, sync_bootstrap_port

pytestmark = pytest.mark.timeout(150)


def over_gloo(store: Any, rank: int, world_size: int, nnodes: int | None) -> dict[str, Any]:
    """A rank whose launcher gave it a port of its own, as on another node."""
    import torch.distributed as dist

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("commplane_disagg").addHandler(handler)
    logging.getLogger("commplane_disagg").setLevel(logging.INFO)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=90))
    with bind_listener("127.0.0.1") as bound:
        synced = sync_bootstrap_port(bound.port, nnodes=nnodes)
        answer = {"bound": bound.port, "synced": synced, "log": lines}
    dist.destroy_process_group()
    return answer


def without_leader(store: Any, rank: int, world_size: int) -> None:
    """Rank 0 never comes to the sync."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=90))
    if rank == 0:
        store.wait(["rank 1 has given up"], timedelta(seconds=90))
        return
    try:
        sync_bootstrap_port(4000 + rank, nnodes=2, timeout=0.5)
    finally:
        store.set("rank 1 has given up", "")


def test_over_torch_distributed_every_rank_gets_the_port_that_rank_0_has_bound_and_says_so_once() -> None:
    outcomes = run_processes(3, over_gloo, 2, timeout=120)
    answers = [outcome.result for outcome in outcomes]
    assert [outcome.error for outcome in outcomes] == [None] * 3, outcomes
    leaders = answers[0]["bound"]
    assert len({answer["bound"] for answer in answers}) == 3
    assert [answer["synced"] for answer in answers] == [leaders] * 3
    assert answers[0]["log"] == []
    for rank in (1, 2):
        own = answers[rank]["bound"]
        assert answers[rank]["log"] == [f"bootstrap port of rank {rank}: {own} is bound here, rank 0's {leaders} is used"]


def test_a_leader_that_does_not_come_is_named_at_the_deadline() -> None:
    outcome = run_processes(2, without_leader, timeout=120)[1]
    assert outcome.error == "PeerError"
    assert outcome.message.startswith("no bootstrap port came from rank 0 within 0.5 s: ")


def test_a_single_node_takes_its_local_port_and_asks_nobody() -> None:
    class NobodyAnswers:
        rank = 0

        def sync_bootstrap(self, value: Any) -> Any:
            raise AssertionError("a single node communicated")

    assert sync_bootstrap_port(8998, nnodes=1) == 8998  # torch.distributed is not initialised here
    assert sync_bootstrap_port(8998, nnodes=1, plane=NobodyAnswers()) == 8998


@pytest.mark.parametrize(("nnodes", "nodes"), [(2, "2 nodes"), (None, "an unknown number of nodes")])
def test_several_nodes_without_torch_distributed_are_told_what_to_do(nnodes: int | None, nodes: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"^the bootstrap port of {nodes} wants torch.distributed initialised before"
    ) as caught:
        sync_bootstrap_port(8998, nnodes=nnodes)
    assert "init_process_group or pass plane=" in str(caught.value)
    assert not isinstance(caught.value, CommplaneError)


def test_over_a_plane_the_leaders_port_comes_through_the_hook_and_a_plugin_may_know_better() -> None:
    class Highest:
        @hookimpl
        def commplane_sync_bootstrap(self, bootstrap: Bootstrap, value: int) -> int:
            return int(max(bootstrap.all_gather(value, what="highest port")))

    def other(_rank: int) -> PluginHost:
        host = PluginHost()
        host.register(Highest(), "highest")
        return host

    def rank_main(plane: Any) -> int:
        return sync_bootstrap_port(9000 + plane.rank, plane=plane)

    assert run_threads(3, rank_main) == [9000] * 3
    assert run_threads(3, rank_main, plugins=other) == [9002] * 3


def test_ranks_that_bind_nothing_take_part() -> None:
    ports = run_threads(3, lambda plane: sync_bootstrap_port(9000 if plane.rank == 0 else None, plane=plane))
    assert ports == [9000] * 3


@pytest.mark.parametrize("port", [None, 0, 65536])
def test_a_leader_without_a_bound_port_is_an_error_on_every_rank(port: int | None) -> None:
    results = run_threads(3, lambda plane: sync_bootstrap_port(port if plane.rank == 0 else 9000, plane=plane))
    assert [type(result) for result in results] == [ConfigError] * 3
    assert str(results[2]).startswith(f"rank 0 has no bound port, found {port}: it has to call bind_listener")


def test_arguments_without_meaning_are_refused() -> None:
    with pytest.raises(ConfigError, match="wants nnodes of at least 1, found 0"):
        sync_bootstrap_port(1, nnodes=0)
    with pytest.raises(ConfigError, match="each rank wants the bound port, found None"):
        sync_bootstrap_port(None, nnodes=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::", "localhost"])
def test_a_bound_socket_takes_connections_before_anybody_serves_and_its_port_cannot_be_taken(host: str) -> None:
    with bind_listener(host) as bound:
        target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, bound.host)
        with socket.create_connection((target, bound.port), timeout=5):
            pass
        with pytest.raises(ConfigError, match=r"^cannot listen on .*Address already in use; choose another"):
            bind_listener(host, bound.port)
        shown = f"[{bound.host}]:{bound.port}" if ":" in bound.host else f"{bound.host}:{bound.port}"
        assert str(bound) == shown
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((target, bound.port), timeout=5)


def test_the_ipv6_wildcard_takes_ipv4_too_and_an_ipv6_address_does_not() -> None:
    with bind_listener("::") as bound, socket.create_connection(("127.0.0.1", bound.port), timeout=5):
        pass
    with bind_listener("::1") as bound, pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", bound.port), timeout=5)


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 70000), ("no such host.invalid", 0), ("a..b", 0)])
def test_what_cannot_be_bound_is_an_error_that_names_it(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}: "):
        bind_listener(host, port)


def test_closing_a_bound_socket_is_idempotent() -> None:
    bound: BoundSocket = bind_listener()
    bound.close()
    bound.close()
    assert bound.socket.fileno() == -1
