"""Every way to meet: torchrun, a default group of the user's, a given store; and what is said when there is none."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import commplane
from commplane import errors
from commplane.testing import PluginHost, run_processes

USES_PLANE = """
import sys, torch, torch.distributed as dist, commplane
if "group" in sys.argv:
    dist.init_process_group("gloo")
with commplane.init() as plane:
    tp = plane.communicator("tp")
    print(plane.origin, plane.rank, tp.all_reduce(torch.ones(1)).item(), flush=True)
if "group" in sys.argv:
    t = torch.ones(1)
    dist.all_reduce(t)
    assert t.item() == 2.0
    dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize(("argument", "origin"), [("env", "torchrun environment"), ("group", "default group")])
def test_ranks_without_a_launcher_meet_through_the_environment(argument: str, origin: str, tmp_path: Path) -> None:
    """Rank 0 hosts the store here: it has to leave last."""
    script = tmp_path / "script.py"
    script.write_text(USES_PLANE)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::commplane.errors.CommplaneWarning", str(script), argument],
            env={**os.environ, **place, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for r, process in enumerate(ranks):
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        assert out == f"{origin} {r} 2.0\n"
        assert "CommplaneWarning" not in err


def meets_in_a_file(_store: Any, rank: int, world_size: int, path: str) -> list[Any]:
    store = torch.distributed.FileStore(path, world_size)
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost()) as plane:
        tp = plane.communicator("tp")
        return [plane.origin, tp.all_reduce(torch.ones(1)).item()]


def test_a_given_store_of_another_kind_will_do(tmp_path: Path) -> None:
    outcomes = run_processes(2, meets_in_a_file, str(tmp_path / "store"))
    assert [o.result for o in outcomes] == [["given store", 2.0]] * 2, [o.output for o in outcomes]


def test_without_any_rendezvous_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(errors.ConfigError, match=r"no rendezvous: .*commplane run --ranks 2"):
        commplane.init(plugins=PluginHost())


@pytest.mark.parametrize("given", [{"rank": 0}, {"store": object()}, {"store": object(), "rank": 2, "world_size": 2}])
def test_half_a_rendezvous_is_an_error(given: dict[str, Any]) -> None:
    with pytest.raises(errors.ConfigError, match="init wants"):
        commplane.init(plugins=PluginHost(), **given)
