"""``commplane-disagg demo`` as users run it, in processes of its own."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from commplane_disagg.demo.network import refusal

pytest.importorskip("torch", reason="wants torch: pip install torch")

pytestmark = pytest.mark.timeout(170)

REFUSAL = refusal()
isolated_only = pytest.mark.skipif(
    REFUSAL is not None, reason=f"wants network namespaces, as root or with user namespaces: {REFUSAL}"
)

COMMAND = [sys.executable, "-c", "import sys; from commplane_disagg.cli import main; sys.exit(main())", "demo"]
PROMPTS = "Hi!\nA prompt of more than two pages, whose pages travel.\n"
MARK = "MARK_OF_A_DEMO_UNDER_TEST"

Demo = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With a mark by which every process of a demo is found, and a folder for the flight records of faults."""
    return {**os.environ, MARK: secrets.token_hex(8), "COMMPLANE_FLIGHT_DIR": str(tmp_path / "flight")}


@pytest.fixture
def demo(tmp_path: Path, environment: dict[str, str]) -> Demo:
    """Run it to its end with two prompts, and see that no process of it is left."""

    def run(*arguments: str, prompts: str = PROMPTS) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "prompts.txt"
        file.write_text(prompts)
        done = subprocess.run(
            [*COMMAND, "--prompts", str(file), "--tokens", "4", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=160,
            check=False,
        )
        assert left(environment) == []
        return done

    return run


def left(environment: dict[str, str]) -> list[str]:
    """Processes that have the mark, also those in namespaces."""
    wanted = f"{MARK}={environment[MARK]}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it ended, or is another user's
            continue
    return found


def test_on_loopback_the_tokens_and_pages_of_two_prefill_nodes_are_those_of_one_process(demo: Demo) -> None:
    done = demo("--network", "loopback")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prefill on 127.0.0.1 and 127.0.0.2, decode on 127.0.0.3" in done.stdout
    assert "engine: shm; prefill tp 2, decode tp 1" in done.stdout
    assert "2 of 2 rooms have the tokens and the pages of one process" in done.stdout


@isolated_only
def test_between_namespaces_pages_travel_over_tcp_to_as_many_decode_ranks(demo: Demo) -> None:
    done = demo("--network", "namespaces", "--decode-tp", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prefill on 10.77.0.1 and 10.77.0.2, decode on 10.77.0.3" in done.stdout
    assert "engine: tcp (not shm: " in done.stdout and "in another network namespace" in done.stdout
    assert "prefill tp 2, decode tp 2" in done.stdout
    # Each node has bound a port of its own, and all use that of the first.
    bound, used = done.stdout.partition("bound: ")[2].splitlines()[0].split("; used by all ranks: ")
    first, second = bound.split(", ")
    assert first == used and first.startswith("10.77.0.1:") and second.startswith("10.77.0.2:")
    assert "2 of 2 rooms have the tokens and the pages of one process" in done.stdout


def test_without_the_port_sync_the_other_node_is_refused_as_upstream_was(demo: Demo) -> None:
    done = demo("--network", "loopback", "--no-port-sync")
    assert done.returncode == 3, done.stdout + done.stderr
    lines = {line.partition(":")[0]: line for line in done.stdout.splitlines()}
    refused = lines["prefill rank 1 on node 1"]
    assert "PeerError" in refused and "Connection refused" in refused and "127.0.0.1:" in refused
    assert "missing are dp0/cp0/tp1/pp0" in lines["prefill rank 0 on node 0"]
    assert "PeerError: group 'prefill' " in lines["decode rank 0 on node 2"]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_demo_that_is_killed_or_interrupted_leaves_no_process(how: signal.Signals, environment: dict[str, str]) -> None:
    network = "loopback" if REFUSAL is not None else "namespaces"
    with subprocess.Popen(
        [*COMMAND, "--network", network, "--tokens", "2000"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    ) as process:
        await_that(lambda: sum("commplane_disagg.demo.rank" in line for line in left(environment)) == 3)
        if how is signal.SIGINT:
            os.killpg(process.pid, how)  # Ctrl-C is for the whole group
        else:
            process.send_signal(how)
        assert process.wait(60) == (130 if how is signal.SIGINT else -how)
    # Nor a namespace: those without a name end with the last process in them.
    await_that(lambda: not left(environment))


def await_that(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def test_what_cannot_be_cut_is_refused_in_one_line(demo: Demo) -> None:
    done = demo("--network", "loopback", "--prefill-tp", "3")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("commplane-disagg demo: ") and "3 tp ranks must divide 4 kv heads" in done.stderr


@pytest.mark.long
def test_an_engine_that_nobody_has_is_refused_by_every_rank(demo: Demo) -> None:
    done = demo("--network", "loopback", "--engine", "pigeon")
    assert done.returncode == 1 and done.stdout.count("no transfer engine 'pigeon': wanted one of") == 3, done.stdout


@pytest.mark.long
@isolated_only
@pytest.mark.parametrize(("prefill", "decode"), [(1, 4), (4, 1), (4, 4)])
def test_any_two_sizes_that_the_heads_can_be_cut_into_serve_each_other(demo: Demo, prefill: int, decode: int) -> None:
    done = demo("--prefill-tp", str(prefill), "--decode-tp", str(decode))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"prefill tp {prefill}, decode tp {decode}" in done.stdout
    assert "2 of 2 rooms" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("engine", ["tcp", "nixl", "mooncake"])
def test_other_engines_bring_the_same_pages(demo: Demo, engine: str) -> None:
    if engine != "tcp":
        # In a process of its own, for what a native library may do to this one.
        module = {"nixl": "nixl._api", "mooncake": "mooncake.engine"}[engine]
        tried = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=60, check=False
        )
        if tried.returncode:
            why = tried.stderr.strip().rpartition("\n")[2]
            pytest.skip(f"wants {engine} and its libraries: pip install 'commplane-disagg[{engine}]' ({why})")
    done = demo("--network", "loopback", "--engine", engine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"engine: {engine}; " in done.stdout and "2 of 2 rooms" in done.stdout


@pytest.mark.long
@isolated_only
def test_a_slow_link_makes_it_slower_and_changes_nothing(demo: Demo) -> None:
    done = demo("--network", "namespaces", "--mbit", "20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 rooms" in done.stdout


@pytest.mark.long
@isolated_only
@pytest.mark.parametrize("fault", ["registry", "unplug"])
def test_what_does_not_concern_rooms_or_is_mended_in_time_changes_nothing(demo: Demo, fault: str) -> None:
    done = demo("--network", "namespaces", "--fault", fault)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"registry": "the registry ends", "unplug": "is plugged in again"}[fault] in done.stdout
    assert "2 of 2 rooms" in done.stdout


@pytest.mark.long
@isolated_only
@pytest.mark.parametrize(
    ("fault", "happened", "silent"),
    [
        ("kill-prefill", "prefill rank 1 on node 1 was killed", "prefill rank 1 on node 1"),
        ("stop-prefill", "prefill rank 1 on node 1 was stopped", "prefill rank 1 on node 1"),
        ("kill-decode", "decode rank 0 on node 2 was killed", "decode rank 0 on node 2"),
        ("cut", "the cable of 10.77.0.2 was pulled", ""),
    ],
)
def test_what_cannot_be_mended_is_an_error_with_a_name_on_every_rank_in_time(
    demo: Demo, fault: str, happened: str, silent: str
) -> None:
    done = demo("--network", "namespaces", "--fault", fault, "--timeout", "15")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert happened in lines
    ranks = ["prefill rank 0 on node 0", "prefill rank 1 on node 1", "decode rank 0 on node 2"]
    ends = {
        rank: [line for line in lines if line.startswith((f"{rank}: ", f"{rank} was still", f"{rank} was killed by"))]
        for rank in ranks
    }
    for rank, said in ends.items():
        assert len(said) == 1, done.stdout
        # Somebody is missing at a deadline, or an engine lost its peer. Only who was killed or stopped says nothing.
        typed = said[0].startswith((f"{rank}: PeerError: ", f"{rank}: CommplaneError: "))
        assert typed == (rank != silent), done.stdout
