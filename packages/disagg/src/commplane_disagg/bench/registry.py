"""How long the ranks of a job take to register, one rank to read the table, and all of them to agree on a port.

The registry runs in a process of its own, with authentication. A rank is a connection: this process opens all of them, each sends
one request that was signed beforehand, as 1,024 ranks on their own machines would, and the time runs from the first connect to
the last answer; beside it, turn by turn, the same requests to an aiohttp that does nothing with them. Through `RegistryClient` in
threads shows what registering costs where one process does it for many. The port sync runs between processes over gloo, each with
a port of its own, after a barrier.
"""

from __future__ import annotations

import argparse
import os
import secrets
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from commplane.api import Deadline
from commplane.errors import CommplaneError
from commplane_disagg.registry import RegistryClient, new_instance
from commplane_disagg.registry.auth import ENVIRONMENT, Signer
from commplane_disagg.registry.server import allow_many_files
from commplane_disagg.wire import MSGPACK, ROUTES, Coordinate, EngineOffer, Registration, Row, Topology, encode

__all__ = ["add_arguments", "run", "table"]

_METADATA = 256
"""Bytes of engine metadata in a row: an address, a port and a key; NIXL's is larger, in the kilobytes."""


_GROUPS = 30
"""Groups of each kind that the rounds go through: a registry keeps 64."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("--ranks", type=int, default=1024, help="ranks that register (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions; medians are told (default: %(default)s)")
    parser.add_argument("--port-ranks", type=int, default=4, help="processes that agree on a port (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure: seconds, medians over the rounds, with the fastest and slowest of them."""
    token = secrets.token_hex(16).encode()
    kept: dict[str, list[float]] = {"raw": [], "bare": [], "through": [], "table": []}
    allow_many_files()
    serve = ["commplane_disagg.cli", "serve", "--host", "127.0.0.1", "--port", "0", "--lease", "600"]
    with (
        _serving(serve, token) as port,
        _serving(["commplane_disagg.bench.bare_server"], token) as bare,
        RegistryClient("127.0.0.1", port, token=token) as client,
    ):
        for number in range(arguments.rounds + 1):  # the first one warms up
            flood, threads, epoch = f"flood{number % _GROUPS}", f"threads{number % _GROUPS}", number // _GROUPS
            seconds = {
                "raw": _flood(port, token, flood, arguments.ranks, epoch),
                "bare": _flood(bare, token, flood, arguments.ranks, epoch),
                "through": _threads(port, token, threads, arguments.ranks, epoch),
                "table": _read(client.of(flood), arguments.ranks),
            }
            if number:
                for name, value in seconds.items():
                    kept[name].append(value)
    return {
        "ranks": arguments.ranks,
        "authenticated": True,
        "register_seconds": _spread(kept["raw"]),
        "bare_aiohttp_seconds": _spread(kept["bare"]),
        "register_over_bare": statistics.median(one / other for one, other in zip(kept["raw"], kept["bare"], strict=True)),
        "register_through_client_seconds": _spread(kept["through"]),
        "table_read_seconds": _spread(kept["table"]),
        "port_sync": _port_sync(arguments.port_ranks, arguments.rounds),
    }


def table(found: dict[str, Any]) -> list[str]:
    """Lines for a reader."""
    rows = [
        (f"{found['ranks']} ranks register, authenticated", found["register_seconds"]),
        ("  the same requests to a bare aiohttp", found["bare_aiohttp_seconds"]),
        ("  through RegistryClient, 16 threads", found["register_through_client_seconds"]),
        ("the whole table, read and decoded", found["table_read_seconds"]),
        (f"port sync, {found['port_sync']['ranks']} processes", found["port_sync"]["seconds"]),
    ]
    lines = [f"{'':42}{'median':>10}{'fastest':>10}{'slowest':>10}   ms"]
    for text, spread in rows:
        lines.append(f"{text:42}" + "".join(f"{1e3 * spread[name]:10.2f}" for name in ("median", "min", "max")))
    lines.append(f"registering costs {found['register_over_bare']:.2f} of what aiohttp alone does")
    return lines


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


@contextmanager
def _serving(module: list[str], token: bytes) -> Iterator[int]:
    """A server in another process that prints where it serves: its port."""
    environment = {**os.environ, ENVIRONMENT: token.decode()}
    with subprocess.Popen([sys.executable, "-m", *module], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("serving on "):
                raise CommplaneError(f"a server of the bench did not start, it said {line!r}")
            yield int(line.split()[2].rpartition(":")[2])
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _registration(rank: int, ranks: int, epoch: int) -> Registration:
    topology = Topology(tp=ranks, page_size=64, kv_dtype="bfloat16", layers=80, kv_heads=8, head_dim=128, model="bench")
    engines = (EngineOffer("tcp", secrets.token_bytes(_METADATA)),)
    row = Row(key=Coordinate(tp=rank), host="127.0.0.1", port=20000, instance=new_instance(), epoch=epoch, engines=engines)
    return Registration(topology=topology, row=row)


def _flood(port: int, token: bytes, group: str, ranks: int, epoch: int) -> float:
    """All ranks at once, a connection each: seconds from the first connect to the last answer."""
    signer, path = Signer(token), f"{ROUTES}/groups/{group}/rows"
    requests = []
    for rank in range(ranks):
        body = encode(_registration(rank, ranks, epoch))
        head = (
            f"PUT {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: {MSGPACK}\r\nContent-Type: {MSGPACK}\r\n"
            f"Authorization: {signer.header('PUT', path, MSGPACK, body)}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    deadline = Deadline(60.0)
    answers = 0
    with selectors.DefaultSelector() as selector:
        begun = time.perf_counter()
        try:
            for request in requests:
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(("127.0.0.1", port))
                selector.register(sock, selectors.EVENT_WRITE, request)
            while answers < ranks:
                if deadline.expired:
                    raise CommplaneError(f"{answers} of {ranks} registrations were answered within {deadline.seconds:g} s")
                for key, _ in selector.select(1.0):
                    assert isinstance(key.fileobj, socket.socket)
                    if key.data is not None:
                        key.fileobj.sendall(key.data)  # a few hundred bytes into an empty buffer: never short
                        selector.modify(key.fileobj, selectors.EVENT_READ, None)
                        continue
                    answer = key.fileobj.recv(4096)
                    if not answer.startswith(b"HTTP/1.1 200"):
                        raise CommplaneError(f"a registration of the bench was answered with {answer[:200]!r}")
                    answers += 1
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            return time.perf_counter() - begun
        finally:
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()


def _threads(port: int, token: bytes, group: str, ranks: int, epoch: int) -> float:
    """The same through the client, 16 threads of this process with a connection each."""
    asked = [_registration(rank, ranks, epoch) for rank in range(ranks)]
    with RegistryClient("127.0.0.1", port, token=token, group=group) as client, ThreadPoolExecutor(16) as pool:
        begun = time.perf_counter()
        for _ in pool.map(lambda one: client.register(one.topology, one.row), asked):
            pass
        return time.perf_counter() - begun


def _read(client: RegistryClient, ranks: int) -> float:
    """The whole table, read, checked and decoded: the median of 9."""
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        view = client.table()
        times.append(time.perf_counter() - begun)
        if len(view.rows) != ranks or not view.ready:
            raise CommplaneError(f"the table of the bench has {len(view.rows)} of {ranks} rows")
    return statistics.median(times)


def _port_sync(ranks: int, rounds: int) -> dict[str, Any]:
    """Processes over gloo: of each round the slowest rank."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "commplane_disagg.bench.port_rank", f"{folder}/store", str(ranks), str(rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment) for rank in range(ranks)
        ]
        try:
            outputs = [process.communicate(timeout=120)[0] for process in processes]
        except subprocess.TimeoutExpired as error:
            raise CommplaneError("the port sync of the bench did not end within 120 s") from error
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        raise CommplaneError(f"the port sync of the bench ended with {[process.returncode for process in processes]}")
    lines = [output.split() for output in outputs]
    ports = {line[1] for line in lines}
    if len(ports) != 1 or len({line[0] for line in lines}) != ranks:
        raise CommplaneError(f"the port sync of the bench gave {sorted(ports)}")
    slowest = [max(float(line[2 + i]) for line in lines) for i in range(rounds)]
    return {"ranks": ranks, "seconds": _spread(slowest)}
