"""What the network and strangers can do to whoever asks a registry: forged refusals, slow answers, names that are none."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from disagg_rows import TOKEN, Serve, client_of, eventually, row, serving, topology

import commplane_disagg.resolve
from commplane.api import TransferContext
from commplane.errors import CommplaneError, ConfigError, PeerError
from commplane_disagg.engines.envelope import seal
from commplane_disagg.engines.tcp import Tcp
from commplane_disagg.engines.tcp.engine import TcpMetadata
from commplane_disagg.port import bind_listener
from commplane_disagg.registry import Lease, RegistryClient, join
from commplane_disagg.resolve import resolve
from commplane_disagg.wire import Problem, Registered, Row, Topology, encode

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def serve() -> Iterator[Serve]:
    with serving() as start:
        yield start


@contextlib.contextmanager
def stranger(answer: Callable[[socket.socket], None], port: int = 0) -> Iterator[int]:
    """Somebody who listens at a port without the token, and answers each request."""
    listener = socket.create_server(("127.0.0.1", port), backlog=16)
    over = threading.Event()

    def serves() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                answer(connection)

    thread = threading.Thread(target=serves)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        listener.close()


def refusal(status: int, problem: Problem) -> Callable[[socket.socket], None]:
    body = encode(problem)
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/msgpack\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


@pytest.mark.parametrize("status", [401, 413])
@pytest.mark.parametrize("code", ["stale", "unknown_row"])
def test_who_takes_the_port_of_a_registry_cannot_end_leases_without_the_token(serve: Serve, status: int, code: str) -> None:
    server = serve(lease=0.6)
    asked: list[float] = []
    lost: list[CommplaneError] = []
    forged = refusal(status, Problem(code=code, message="made up"))

    def answer(connection: socket.socket) -> None:
        forged(connection)
        asked.append(time.monotonic())

    with client_of(server) as client, Lease(client, topology(), row(0), on_lost=lost.append) as lease:
        server.close()
        with stranger(answer, server.port):
            eventually(lambda: len(asked) >= 3)
            lease.check()
        assert lost == []
        again = serve(lease=0.6, port=server.port)
        eventually(lambda: lease.server == again.service.server)


def test_an_answer_that_drips_ends_with_the_call(serve: Serve) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while not over.wait(0.1):
            connection.sendall(b"X")

    with stranger(drip) as port, RegistryClient("127.0.0.1", port, token=TOKEN, timeout=1.0, attempt=0.5) as client:
        ended: list[object] = []
        call = threading.Thread(target=lambda: ended.append(_error_of(client.table)))
        call.start()
        call.join(15)
        is_out = call.is_alive()
        over.set()
        call.join(10)
        assert not is_out, "the call outlives its deadline"
        assert isinstance(ended[0], PeerError) and "gave no answer within 1 s" in str(ended[0])


def _error_of(call: Callable[[], object]) -> object:
    try:
        return call()
    except CommplaneError as error:
        return error


def test_a_resolver_that_does_not_answer_ends_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    over, real, asked = threading.Event(), socket.getaddrinfo, []

    def stuck(host: str, port: int, **options: int) -> object:
        if host == "127.0.0.1":
            return real(host, port, **options)  # type: ignore[arg-type]
        if options["flags"]:
            raise socket.gaierror(socket.EAI_NONAME, "not an address")
        asked.append(host)
        over.wait(20)
        return real("127.0.0.1", port, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(commplane_disagg.resolve.socket, "getaddrinfo", stuck)
    try:
        with pytest.raises(PeerError, match=r"the resolver did not say in time where 'nowhere\.example' is"):
            RegistryClient("nowhere.example", 1, token=TOKEN, timeout=0.5, attempt=0.1).table()
        with pytest.raises(PeerError, match="the resolver did not say in time"):
            _tcp_connect("nowhere.example", 1, timeout=0.3)
        assert asked == ["nowhere.example"], "tries wait for the same answer"
    finally:
        over.set()
    eventually(lambda: "commplane-resolve" not in {thread.name for thread in threading.enumerate()})
    assert resolve("nowhere.example", 1, time.monotonic() + 10)[0][4][0] == "127.0.0.1"


def _tcp_connect(host: str, port: int, timeout: float = 5.0) -> None:
    engine = Tcp()
    engine.open(TransferContext("writer", timeout=timeout))
    engine.register(engine.allocate(4096))
    try:
        engine.connect("reader", seal("tcp", 1, TcpMetadata(host, port, bytes(32), 4096)))
    finally:
        engine.close()


NO_NAMES = ["a..b", ".a", "a" * 64 + ".example", "x\0y", "\ud800"]


@pytest.mark.parametrize("host", [*NO_NAMES[:3], "a.-b", "a-.b", "a." * 127 + "a"])
def test_a_row_whose_host_no_resolver_takes_is_refused(serve: Serve, host: str) -> None:
    with client_of(serve()) as client, pytest.raises(ConfigError, match="neither an address nor a host name"):
        client.register(topology(), row(0, host=host))


@pytest.mark.parametrize("host", ["node-1", "a" * 63 + ".example", "a.b_c.D.", "_x", "1.example"])
def test_a_row_whose_host_is_a_name_is_taken(serve: Serve, host: str) -> None:
    with client_of(serve()) as client:
        assert client.register(topology(), row(0, host=host)).host == host


@pytest.mark.parametrize("host", NO_NAMES)
def test_to_ask_at_a_host_that_is_none_is_an_error_of_ours(host: str) -> None:
    if host.isascii():  # the metadata is in UTF-8
        with pytest.raises(PeerError, match="cannot be reached"):
            _tcp_connect(host, 1)
    with pytest.raises(PeerError):
        RegistryClient(host, 1, token=TOKEN, timeout=0.2).table()


def test_joining_several_nodes_without_torch_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "torch.distributed"):
        monkeypatch.setitem(sys.modules, name, None)
    bound = bind_listener("127.0.0.1")
    with pytest.raises(RuntimeError, match=r"the bootstrap port of 2 nodes wants torch\.distributed initialised"):
        join(topology(), row(0), registry_host="127.0.0.1", bound=bound, token=TOKEN, nnodes=2)
    assert bound.socket.fileno() == -1


class Late(RegistryClient):
    """Its second registration is on its way until `arrive`."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port, token=TOKEN, timeout=5)
        self.count, self.sent, self.arrive = 0, threading.Event(), threading.Event()

    def register(self, topology: Topology, row: Row, *, peer_address: bool = False, timeout: float | None = None) -> Registered:
        self.count += 1
        if self.count == 2:
            self.sent.set()
            assert self.arrive.wait(20)
        return super().register(topology, row, peer_address=peer_address, timeout=timeout)


def test_a_registration_that_arrives_after_its_lease_was_closed_leaves_no_row(serve: Serve) -> None:
    first = serve(lease=0.6)
    lost: list[CommplaneError] = []
    with Late(first.port) as client:
        lease = Lease(client, topology(), row(0), on_lost=lost.append)
        first.close()
        serve(lease=30.0, port=first.port)
        assert client.sent.wait(10)
        assert lease.close(timeout=0.2) is False
        client.arrive.set()
        eventually(lambda: not any(thread.name.startswith("commplane-disagg lease") for thread in threading.enumerate()))
        assert client.table().rows == ()
        lease.check()
        assert lost == []
