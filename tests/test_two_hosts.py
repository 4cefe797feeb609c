"""Two hosts on one machine: network namespaces joined by a bridge, each with shared memory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import commplane
from commplane.testing import run_processes

BRIDGE, NETWORK = f"cpb{os.getpid() % 10000}", "10.213.77"
HOSTS = (f"cph{os.getpid() % 10000}a", f"cph{os.getpid() % 10000}b")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def may_make_networks() -> bool:
    """Whether iproute2 is here and this user may make a network namespace (root)."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", HOSTS[0]], capture_output=True, check=False).returncode == 0
    if made:
        ip("netns", "delete", HOSTS[0])
    return made


pytestmark = pytest.mark.skipif(not may_make_networks(), reason="wants root and iproute2 to make network namespaces")


@pytest.fixture
def hosts() -> Iterator[None]:
    """A bridge with this process on .1, and two namespaces on .2 and .3."""
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for i, host in enumerate(HOSTS):
            outer, inner = f"{host}o", f"{host}i"
            ip("netns", "add", host)
            ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            ip("link", "set", outer, "master", BRIDGE, "up")
            ip("link", "set", inner, "netns", host)
            ip("-n", host, "address", "add", f"{NETWORK}.{i + 2}/24", "dev", inner)
            ip("-n", host, "link", "set", inner, "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)
        ip("link", "delete", BRIDGE)


def rank_main(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    # Plugins come from their entry points here, as on a real host.
    with commplane.init(store=store, rank=rank, world_size=world_size) as plane:
        everyone = plane.communicator("tp")
        return {
            "hosts": [list(h) for h in plane.facts.hosts(range(world_size))],
            "backends": list(everyone.plan.backends),
            "reason": next(c.reason for c in everyone.plan.candidates if c.name == "custom_ar"),
            "sum": everyone.all_reduce(torch.full((1000,), float(rank + 1)))[-1].item(),
            "digest": everyone.plan.digest,
        }


def test_a_group_that_spans_hosts_runs_over_the_network_and_not_through_shared_memory(hosts: None) -> None:
    def command(rank: int) -> list[str]:
        private = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", HOSTS[rank], "unshare", "-m", "sh", "-c", private, "sh", sys.executable]

    def env(rank: int) -> dict[str, str]:
        return {"GLOO_SOCKET_IFNAME": f"{HOSTS[rank]}i"}

    outcomes = run_processes(2, rank_main, command=command, env=env, address=f"{NETWORK}.1", timeout=90)
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
        assert o.result["hosts"] == [[0], [1]]
        assert o.result["backends"] == ["torch"] and "spans hosts" in o.result["reason"]
        assert o.result["sum"] == 3.0
    assert outcomes[0].result == outcomes[1].result
