"""Several hosts on one machine, as far as communication can tell: ``python -m commplane.testing.hosts -- -m commplane doctor``.

As root each host is a set of namespaces: a network of its own with one interface, joined to the others by a bridge; its own
``/dev/shm``; processes that cannot see those of other hosts, all of which end with the first of them. The namespaces have no
names and nothing on the machine can clash with their addresses; they are gone when the last process in them is, in whatever way.
Without root hosts are told apart by the setting ``host_alias`` alone, and share loopback. Either way a host has cores of its own
where there are enough.

    this process    a network namespace of its own (`isolated`), with a bridge
      host 0..n-1   namespaces each, with eth0, 10.78.0.(host + 1)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commplane.errors import CommplaneError

__all__ = ["Host", "agents", "isolated", "loopback", "namespaces", "refusal"]

_SECONDS = 20.0
_INSIDE = "--in-namespace"
# What this process holds open is what lets the first process of the host live.
_FIRST = (
    'hostname "$0" && mount -t proc proc /proc && mount -t tmpfs -o size=1g tmpfs /dev/shm && ip link set lo up '
    "&& echo up && exec cat"
)


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        address: where its ranks listen.
        command: what to put before a command to run it there.
        env: variables that its processes need.
        cores: that its ranks may run on; empty for any.
        holder: the process that its namespaces end with, or None on loopback.
    """

    address: str
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    holder: subprocess.Popen[str] | None = None

    def kill(self) -> None:
        """End every process of the host at once, as a power cut would, but that its network goes down in order."""
        if self.holder is None:
            raise CommplaneError("a host on loopback has no processes of its own to kill: wanted one of namespaces")
        self.holder.kill()
        self.holder.wait(_SECONDS)


def refusal() -> str | None:
    """Why there can be no hosts of namespaces here, or None."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install util-linux and iproute2"
    if os.geteuid() != 0:
        return "network namespaces want root"
    script = "ip link add name b0 type bridge && ip link add name v0 type veth peer name v1 && mount -t tmpfs tmpfs /dev/shm"
    try:
        tried = _try(*isolated(), "--pid", "--fork", "sh", "-c", script)
    except subprocess.TimeoutExpired:
        return f"namespaces did not come up within {_SECONDS:g} s"
    return None if tried.returncode == 0 else tried.stderr.strip().replace("\n", "; ") or f"exit code {tried.returncode}"


def isolated() -> list[str]:
    """What to put before a command to run it in a network namespace of its own; `namespaces` works only there."""
    return ["unshare", "--net", "--mount"]


@contextlib.contextmanager
def loopback(count: int) -> Iterator[list[Host]]:
    """Hosts that are told apart by their alias alone."""
    env = {"GLOO_SOCKET_IFNAME": "lo"}
    yield [Host("127.0.0.1", env=env | {"COMMPLANE_HOST_ALIAS": f"host{i}"}, cores=_cores(i, count)) for i in range(count)]


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Host]]:
    """Hosts of namespaces, joined by a bridge. Works in a process that `isolated` has started.

    Raises:
        CommplaneError: a command failed; its text is shown.
    """
    holders: list[subprocess.Popen[str]] = []
    try:
        _run("ip", "link", "add", "name", "bridge", "type", "bridge")
        _run("ip", "link", "set", "bridge", "up")
        for index in range(count):
            holder = subprocess.Popen(
                ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "sh", "-c", _FIRST, f"host{index}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            holders.append(holder)
            _await(holder, index)
        yield [_cabled(index, count, holder) for index, holder in enumerate(holders)]
    finally:
        for holder in holders:
            for stream in (holder.stdin, holder.stdout, holder.stderr):
                if stream is not None:
                    stream.close()
        for holder in holders:
            try:
                holder.wait(_SECONDS)
            except subprocess.TimeoutExpired:
                holder.kill()
                holder.wait()


def agents(
    hosts: Sequence[Host], ranks: int, arguments: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
) -> list[subprocess.Popen[str]]:
    """Start torchrun's agent on each host, `ranks` ranks each, all of one job. Local; the caller waits for them.

    Args:
        hosts: first of them the one with the store.
        ranks: for each host.
        arguments: a Python script, or ``-m`` and a module, and its arguments.
        env: variables beside the caller's and the host's.
        popen: more for `subprocess.Popen`.
    """
    port = "29500" if hosts[0].command else str(_free_port())  # a host of namespaces has all ports to itself
    running = []
    for index, host in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node-rank={index}"]
        pinned = ["taskset", "-c", ",".join(map(str, host.cores))] if host.cores and shutil.which("taskset") else []
        where = [f"--nproc-per-node={ranks}", f"--master-addr={hosts[0].address}", f"--master-port={port}"]
        running.append(
            subprocess.Popen(
                [*host.command, *pinned, *torchrun, *where, *arguments],
                env={"OMP_NUM_THREADS": "1", **os.environ, **host.env, **(env or {})},
                text=True,
                **popen,
            )
        )
    return running


def _cabled(index: int, count: int, holder: subprocess.Popen[str]) -> Host:
    # To a bridge and not to each other: a cable is gone at both ends when the network at one end is.
    outer, address = f"host{index}", f"10.78.0.{index + 1}"
    _run("ip", "link", "add", "name", outer, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
    _run("ip", "link", "set", outer, "master", "bridge", "up")
    of = f"/proc/{holder.pid}/ns"
    spaces = {"net": "net", "mount": "mnt", "uts": "uts", "pid": "pid_for_children"}
    inside = ("nsenter", *(f"--{kind}={of}/{name}" for kind, name in spaces.items()), f"--wd={Path.cwd()}")
    _run(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    _run(*inside, "ip", "link", "set", "eth0", "up")
    return Host(address, inside, {"GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"}, _cores(index, count), holder)


def _cores(index: int, count: int) -> tuple[int, ...]:
    """The share of one host in the cores of this process, or none where there are fewer than hosts."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // count
    return tuple(cores[index * share : (index + 1) * share])


def _await(holder: subprocess.Popen[str], index: int) -> None:
    """Wait until the holder is in its namespaces."""
    assert holder.stdout is not None and holder.stderr is not None
    if select.select([holder.stdout], [], [], _SECONDS)[0] and holder.stdout.readline():
        return
    holder.kill()
    holder.wait()
    raise CommplaneError(f"host {index} has no namespaces: {holder.stderr.read().strip() or f'not up within {_SECONDS:g} s'}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _try(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False)


def _run(*words: str) -> None:
    done = _try(*words)
    if done.returncode:
        raise CommplaneError(f"network of the hosts: {' '.join(words)!r} failed: {done.stderr.strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command on several hosts: 0, or the exit code or signal of the first host whose agent failed."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m commplane.testing.hosts", description="one job on several hosts of one machine"
    )
    parser.add_argument("--hosts", type=int, default=2, metavar="N", help="number of hosts (default 2)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks of each host (default 2)")
    parser.add_argument("--loopback", action="store_true", help="hosts by alias, without root (default namespaces, as root)")
    parser.add_argument(_INSIDE, action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="+", help="a Python file, or after -- -m and a module, and its arguments")
    options = parser.parse_args(argv)
    if not options.loopback and not options.in_namespace:
        reason = refusal()
        if reason is not None:
            parser.error(f"{reason}; --loopback does without")
        command = [*isolated(), sys.executable, "-m", "commplane.testing.hosts", _INSIDE, *argv]
        os.execvp(command[0], command)
    with (loopback if options.loopback else namespaces)(options.hosts) as hosts:
        running = agents(hosts, options.ranks, options.command)
        try:
            return next((abs(code) for code in [agent.wait() for agent in running] if code), 0)  # -9 is a failure
        finally:
            for agent in running:
                if agent.poll() is None:
                    agent.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
