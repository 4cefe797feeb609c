"""``commplane-disagg serve`` as a process: killed, stopped, started again, and what its ranks notice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disagg_rows import TOKEN, eventually, row, topology

from commplane.errors import PeerError
from commplane_disagg.cli import main
from commplane_disagg.port import bind_listener
from commplane_disagg.registry import Follower, Lease, RegistryClient
from commplane_disagg.registry.auth import ENVIRONMENT, metrics_token

pytestmark = pytest.mark.timeout(90)

COMMAND = [sys.executable, "-m", "commplane_disagg.cli", "serve"]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start one: the process and its port."""
    processes: list[subprocess.Popen[str]] = []

    def start(port: int = 0, *options: str) -> tuple[subprocess.Popen[str], int]:
        command = [*COMMAND, "--host", "127.0.0.1", "--port", str(port), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, ENVIRONMENT: TOKEN.decode()})
        processes.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"serving on 127\.0\.0\.1:([0-9]+) with the shared token\n", line)
        assert found, line
        return process, int(found[1])

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def stop(process: subprocess.Popen[str]) -> None:
    """SIGSTOP, and return when every thread has stopped: the signal is not delivered to all of them at once."""
    process.send_signal(signal.SIGSTOP)
    threads = Path(f"/proc/{process.pid}/task")
    eventually(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in threads.iterdir()))


def test_it_serves_until_it_is_told_to_end(serve: Any) -> None:
    process, port = serve()
    with RegistryClient("127.0.0.1", port, token=TOKEN, timeout=10) as client:
        client.register(topology(tp=1), row(0))
        assert client.wait_ready(5).ready
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_port_that_is_taken_a_token_that_is_missing_and_wrong_words_end_it_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT, TOKEN.decode())
    with bind_listener("127.0.0.1") as taken:
        assert main(["serve", "--host", "127.0.0.1", "--port", str(taken.port)]) == 1
    said = f"commplane-disagg serve: cannot listen on 127.0.0.1:{taken.port}: Address already in use"
    assert capsys.readouterr().err.startswith(said)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--no-auth", "--token-file", "x"])
    assert caught.value.code == 2
    monkeypatch.delenv(ENVIRONMENT)
    assert main(["serve", "--port", "0"]) == 1
    assert "wants a shared token, found none" in capsys.readouterr().err


def test_the_scrapers_token_can_be_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(ENVIRONMENT, TOKEN.decode())
    assert main(["serve", "--print-metrics-token"]) == 0
    assert capsys.readouterr().out == metrics_token(TOKEN) + "\n"
    assert main(["serve", "--print-metrics-token", "--no-auth"]) == 2


def test_ranks_of_a_killed_registry_are_all_there_again_after_its_restart_and_nobody_is_called_dead(serve: Any) -> None:
    process, port = serve(0, "--lease", "1")
    with RegistryClient("127.0.0.1", port, token=TOKEN, timeout=30, attempt=1) as client:
        leases = [Lease(client, topology(tp=3), row(tp)) for tp in range(3)]
        instances = [lease.row.instance for lease in leases]
        with Follower(client, wait=1) as follower:
            process.kill()
            process.wait()
            with pytest.raises(PeerError, match=r"gave no answer within 0\.3 s"):
                client.table(timeout=0.3)
            _, again = serve(port, "--lease", "1")
            assert again == port
            view = client.wait_ready(30)
            assert [found.instance for found in view.rows] == instances
            eventually(lambda: all(lease.registrations == 2 and lease.overdue == 0 for lease in leases))
            time.sleep(1.2)  # a lease's length, after which the follower gives up rows that did not come back
            assert follower.poll() == []
            assert follower.ready
        assert [lease.close() for lease in leases] == [True] * 3
        assert client.table().rows == ()


def test_a_stopped_registry_costs_every_call_its_deadline_and_not_more_and_is_used_again_when_it_wakes(serve: Any) -> None:
    process, port = serve(0, "--lease", "2")
    client = RegistryClient("127.0.0.1", port, token=TOKEN, timeout=1.0, attempt=0.4)
    with client, Lease(client, topology(), row(0)) as lease:
        stop(process)
        calls: list[Callable[[], Any]] = [
            client.table,
            lambda: client.register(topology(), row(1)),
            lambda: client.wait_ready(0.5),
            lambda: client.changes(0, wait=0.2),
        ]
        for call in calls:
            begun = time.monotonic()
            with pytest.raises(PeerError, match="the last cause was"):
                call()
            assert time.monotonic() - begun < 10
        process.send_signal(signal.SIGCONT)
        eventually(lambda: lease.overdue == 0 and len(client.table(timeout=10).rows) >= 1)
        lease.check()


def test_a_rank_that_is_killed_is_out_of_the_table_when_its_lease_ends(serve: Any) -> None:
    _, port = serve(0, "--lease", "1")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from disagg_rows import *; from commplane_disagg.registry import *\n"
        f"lease = Lease(RegistryClient('127.0.0.1', {port}, token=TOKEN), topology(), row(1)); print('here', flush=True)\n"
        "time.sleep(60)"
    )
    with (
        subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True) as rank,
        RegistryClient("127.0.0.1", port, token=TOKEN, timeout=10) as client,
    ):
        assert rank.stdout is not None
        assert rank.stdout.readline() == "here\n"
        with Lease(client, topology(), row(0)):
            client.wait_ready(10)
            time.sleep(1.5)
            assert client.table().ready, "it renews"
            rank.kill()
            eventually(lambda: [change.kind for change in client.changes(2, wait=1).changes] == ["expired"])
            with pytest.raises(PeerError, match="missing are dp0/cp0/tp1/pp0"):
                client.wait_ready(0.2)


def test_a_stopped_rank_whose_place_was_taken_finds_out_when_it_wakes(serve: Any) -> None:
    _, port = serve(0, "--lease", "1")
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from disagg_rows import *; from commplane_disagg.registry import *\n"
        "from commplane.errors import CommplaneError\n"
        f"lease = Lease(RegistryClient('127.0.0.1', {port}, token=TOKEN), topology(), row(0, instance='sleeper'))\n"
        "print('here', flush=True)\n"
        "for _ in range(3000):\n"
        "    time.sleep(0.01)\n"
        "    try: lease.check()\n"
        "    except CommplaneError as error: print(error, flush=True); break\n"
    )
    with (
        subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True) as rank,
        RegistryClient("127.0.0.1", port, token=TOKEN, timeout=20) as client,
    ):
        assert rank.stdout is not None
        assert rank.stdout.readline() == "here\n"
        stop(rank)
        with Lease(client, topology(), row(0, instance="successor")):  # waits for the end of the sleeper's lease
            rank.send_signal(signal.SIGCONT)
            said: list[str] = []
            reader = threading.Thread(target=lambda: said.append(rank.stdout.readline()))  # type: ignore[union-attr]
            reader.start()
            reader.join(30)
            assert said and "rank dp0/cp0/tp0/pp0 lost its row" in said[0], said
            assert [found.instance for found in client.table().rows] == ["successor"]
        rank.kill()
