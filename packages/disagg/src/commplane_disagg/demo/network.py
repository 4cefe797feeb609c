"""Three nodes on one machine: a network namespace each where that is allowed, else a loopback address each.

The namespaces have no names. They end with the last process in them, so nothing is left however a process ends, and nothing on
the machine can clash with their addresses:

    this process    a namespace of its own (`isolated`), with a bridge, 10.77.0.254
      node 0..n-1   a namespace each, with eth0, 10.77.0.(node + 1), and an own /dev/shm, as on machines of their own
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from commplane.errors import CommplaneError

__all__ = ["Node", "isolated", "link", "loopback", "namespaces", "refusal", "shape", "with_parent"]

_PR_SET_PDEATHSIG = 1
_SECONDS = 10.0
_HOLD = "mount -t tmpfs -o size=1g tmpfs /dev/shm && ip link set lo up && echo up && exec cat"


@dataclass(frozen=True)
class Node:
    """One host.

    Attributes:
        address: of its ranks.
        interface: that has the address.
        command: what to put before a command to run it there.
        outer: this side of its cable, or "" on loopback.
    """

    address: str
    interface: str
    command: tuple[str, ...] = ()
    outer: str = ""


def with_parent(parent: int) -> None:
    """End this process with `parent`, the one that started it, even if that one is killed. Call it first thing in a child."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it went before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def refusal() -> str | None:
    """Why there can be no network namespaces here, or None."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found; install util-linux and iproute2"
    script = "ip link add name b0 type bridge && ip link add name v0 type veth peer name v1 && mount -t tmpfs tmpfs /dev/shm"
    tried = subprocess.run(
        [*isolated(), "sh", "-c", script], capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False
    )
    return None if tried.returncode == 0 else tried.stderr.strip().replace("\n", "; ") or f"exit code {tried.returncode}"


def isolated() -> list[str]:
    """What to put before a command to run it in a network namespace of its own; `namespaces` works only there."""
    # Without root, in a user namespace whose root is this user, where the kernel allows that.
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--net", "--mount"]


@contextlib.contextmanager
def loopback(count: int) -> Iterator[list[Node]]:
    """Nodes 127.0.0.1, 127.0.0.2 and on."""
    yield [Node(f"127.0.0.{index + 1}", "lo") for index in range(count)]


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[list[Node]]:
    """Nodes in namespaces of their own, joined by a bridge to this process, which `isolated` has started.

    Raises:
        CommplaneError: a command of iproute2 failed; its text is shown.
    """
    holders: list[subprocess.Popen[str]] = []
    try:
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "name", "bridge", "type", "bridge")
        _ip("address", "add", "10.77.0.254/24", "dev", "bridge")
        _ip("link", "set", "bridge", "up")
        nodes = []
        for index in range(count):
            # Holds the namespaces until its input ends: when this process closes it, or ends in whatever way.
            holder = subprocess.Popen(
                ["unshare", "--net", "--mount", "sh", "-c", _HOLD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            holders.append(holder)
            _await(holder, index)
            nodes.append(_cabled(index, holder.pid))
        yield nodes
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


def link(node: Node, up: bool) -> None:
    """Plug the node's cable in, or pull it."""
    _ip("link", "set", node.outer, "up" if up else "down")


def shape(node: Node, mbit: float) -> None:
    """Let at most `mbit` megabits a second out of the node."""
    _run(
        *node.command,
        "tc",
        "qdisc",
        "replace",
        "dev",
        node.interface,
        "root",
        "tbf",
        "rate",
        f"{mbit}mbit",
        "burst",
        "64kb",
        "latency",
        "100ms",
    )


def _cabled(index: int, pid: int) -> Node:
    outer = f"node{index}"
    _ip("link", "add", "name", outer, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    _ip("link", "set", outer, "master", "bridge", "up")
    inside = ("nsenter", f"--net=/proc/{pid}/ns/net", f"--mount=/proc/{pid}/ns/mnt", "--wd=" + os.getcwd())  # noqa: PTH109
    address = f"10.77.0.{index + 1}"
    _run(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    _run(*inside, "ip", "link", "set", "eth0", "up")
    return Node(address, "eth0", inside, outer)


def _await(holder: subprocess.Popen[str], index: int) -> None:
    """Wait until the holder is in its namespaces."""
    assert holder.stdout is not None and holder.stderr is not None
    if select.select([holder.stdout], [], [], _SECONDS)[0] and holder.stdout.readline():
        return
    holder.kill()
    holder.wait()
    raise CommplaneError(f"node {index} has no namespaces: {holder.stderr.read().strip() or f'not up within {_SECONDS:g} s'}")


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str | Sequence[str]) -> None:
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise CommplaneError(f"network of the demo: {' '.join(command)!r} failed: {done.stderr.strip()}")
