"""Two hosts of two ranks by torchrun's agents: on loopback, and as root in networks of their own, one of which is then killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commplane.testing.hosts import isolated, refusal

pytestmark = pytest.mark.timeout(150)

pytest.importorskip("commplane_custom_ar", reason="wants commplane-custom-ar: pip install commplane-custom-ar")

RANKS = Path(__file__).with_name("several_hosts_ranks.py")
KILLED = Path(__file__).with_name("several_hosts_killed.py")
NO_NETWORKS = refusal()
in_networks = pytest.mark.skipif(NO_NETWORKS is not None, reason=f"wants network namespaces: {NO_NETWORKS}")


def on_two_hosts(*arguments: str, loopback: bool) -> str:
    """What one job of two agents printed."""
    where = ["--loopback"] if loopback else []
    command = [sys.executable, "-m", "commplane.testing.hosts", *where, "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_agent_that_a_signal_ended_is_a_failure(tmp_path: Path) -> None:
    script = tmp_path / "kills_its_agent.py"
    script.write_text("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    command = [sys.executable, "-m", "commplane.testing.hosts", "--loopback", "--hosts", "1", "--ranks", "1", "--", str(script)]
    assert subprocess.run(command, capture_output=True, timeout=100, check=False).returncode == 9


def test_agents_on_loopback_get_shared_memory_inside_the_hosts_and_two_levels_over_them(tmp_path: Path) -> None:
    on_two_hosts(str(RANKS), "plans", f"{tmp_path}/rank", loopback=True)
    for rank in range(4):
        said = json.loads((tmp_path / f"rank{rank}").read_text())
        assert said == {
            "hosts": [[0, 1], [2, 3]],
            "world": ["hierarchical", "hierarchical"],
            "attention_tp": ["custom_ar", "custom_ar"],
            "dp": ["torch", "torch"],
            "way": "leaders: custom_ar inside, torch between",
        }


@in_networks
@pytest.mark.long
def test_doctor_shows_hosts_that_are_real_networks_and_what_runs_inside_and_between_them() -> None:
    report: dict[str, Any] = json.loads(on_two_hosts("-m", "commplane", "doctor", "--json", loopback=False))
    assert report["hosts"] == [[0, 1], [2, 3]]
    assert [f["host"] for f in report["facts"]] == ["host0", "host0", "host1", "host1"]
    assert len({f["pid_namespace"] for f in report["facts"]}) == 2
    candidates = {c["name"]: c for c in report["plan"]["candidates"]}
    assert candidates["hierarchical"]["state"] == "ready"
    assert candidates["hierarchical"]["facts"] == {"hosts": "ranks 0, 1 | ranks 2, 3"}
    assert "shared memory does not (ranks 0, 1 on host0; ranks 2, 3 on host1)" in candidates["custom_ar"]["reason"]
    ways = {route[6] for route in report["plan"]["routes"] if route[5] == "hierarchical" and route[0] == "all_reduce"}
    assert ways == {"leaders: custom_ar inside, torch between"}


@in_networks
@pytest.mark.parametrize(
    "victim", [1, pytest.param(0, marks=pytest.mark.long)], ids=["a host without the store", "the host of the store"]
)
def test_a_killed_host_is_named_on_every_rank_that_is_left(victim: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [*isolated(), sys.executable, str(KILLED), str(victim), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=140,
        env={**os.environ, "COMMPLANE_FLIGHT_DIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lost = [2 * victim, 2 * victim + 1]
    for rank in range(4):
        if rank in lost:
            continue
        said = json.loads((tmp_path / f"rank{rank}").read_text())
        assert said["missing"] == lost, said["text"]
        assert said["backend"] == "hierarchical" and f"on host{victim}" in said["text"]
