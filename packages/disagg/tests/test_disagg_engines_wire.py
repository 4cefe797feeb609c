"""The engine tcp against peers that are not what they should be: nothing outside of what was proved and told is ever written."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commplane.api import TransferContext
from commplane.errors import CommplaneError, PeerError
from commplane_disagg.engines.envelope import seal, unseal
from commplane_disagg.engines.tcp import Tcp, receiving, wire
from commplane_disagg.engines.tcp.engine import TcpMetadata
from commplane_disagg.engines.tcp.sending import connect_stream, new_session

SIZE = 65_536
pytestmark = pytest.mark.timeout(60)


@contextlib.contextmanager
def opened(name: str, host: str = "127.0.0.1") -> Iterator[tuple[Tcp, memoryview]]:
    engine = Tcp()
    engine.open(TransferContext(name, host=host, timeout=5.0))
    pool = engine.allocate(SIZE)
    engine.register(pool)
    try:
        yield engine, pool
    finally:
        engine.close()


def known(engine: Tcp) -> TcpMetadata:
    return unseal("tcp", 1, TcpMetadata, engine.metadata(), "reader")


def stream_to(engine: Tcp, token: bytes | None = None) -> socket.socket:
    found = known(engine)
    hello = wire.Hello("stranger", new_session())
    out = connect_stream((found.host, found.port), token or found.token, hello, "reader", 0, time.monotonic() + 5)
    out.settimeout(5.0)
    return out


def until_closed(stream: socket.socket) -> bytes:
    out = b""
    with contextlib.suppress(ConnectionError):
        while more := stream.recv(4096):
            out += more
    return out


def serves(engine: Tcp, pool: memoryview) -> None:
    """A writer that keeps to the protocol is served, as before."""
    with opened("writer") as (writer, source):
        source[:] = random.Random(3).randbytes(SIZE)
        writer.connect("reader", engine.metadata())
        ticket = writer.submit("reader", [0], [0], SIZE)
        assert [(m.ticket, m.error) for m in writer.poll(5.0)] == [(ticket, None)]
        assert bytes(pool) == bytes(source)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=400))
def test_whatever_a_stranger_sends_nothing_is_written(data: bytes) -> None:
    engine, pool = shared()
    found = known(engine)
    with socket.create_connection((found.host, found.port), timeout=5.0) as stream:
        stream.sendall(data)
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_WR)
        until_closed(stream)
    assert not any(pool)


_shared: list[tuple[contextlib.ExitStack, Tcp, memoryview]] = []


def shared() -> tuple[Tcp, memoryview]:
    """One engine for all examples of a property."""
    if not _shared:
        stack = contextlib.ExitStack()
        _shared.append((stack, *stack.enter_context(opened("reader"))))
    return _shared[0][1:]


@pytest.fixture(autouse=True, scope="module")
def end_shared() -> Iterator[None]:
    yield
    for stack, engine, pool in _shared:
        serves(engine, pool)  # after all of it
        stack.close()


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=4),
    total=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
    count=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    flip=st.one_of(st.none(), st.integers(0, 10_000)),
)
def test_a_batch_that_reaches_outside_of_the_pool_writes_nothing_and_ends_its_stream_alone(
    pieces: list[tuple[int, int]], total: int | None, count: int | None, flip: int | None
) -> None:
    engine, pool = shared()
    sane = all(n > 0 and o + n <= SIZE for o, n in pieces) and sum(n for _, n in pieces) <= wire.MOST_BATCH_BYTES
    table = b"".join(struct.pack("!QQ", *piece) for piece in pieces)
    wanted = sum(n for _, n in pieces) & (2**64 - 1)
    head = struct.pack("!4sIQQ", b"CPXb", len(pieces) if count is None else count, 1, wanted if total is None else total)
    packed = bytearray(head + struct.pack("!I", zlib.crc32(table, zlib.crc32(head))) + table)
    if flip is not None:
        packed[flip % len(packed)] ^= 1 << (flip % 8)
    if sane and flip is None and total in (None, wanted) and count in (None, len(pieces)):
        return  # a good one
    with stream_to(engine) as stream:
        stream.sendall(bytes(packed) + b"\xee" * 4096)
        with contextlib.suppress(OSError):
            stream.shutdown(socket.SHUT_WR)
        until_closed(stream)
    assert not any(pool)


def test_a_writer_without_the_token_is_refused() -> None:
    with opened("reader") as (engine, pool):
        with pytest.raises(CommplaneError, match="proof of the token"):
            stream_to(engine, token=bytes(32))
        assert not any(pool)
        serves(engine, pool)


def test_a_listener_without_the_token_is_refused() -> None:
    with opened("reader") as (engine, _), opened("other") as (other, _), opened("writer") as (writer, _):
        found = known(engine)
        mixed = seal("tcp", 1, TcpMetadata(found.host, known(other).port, found.token, found.nbytes))
        with pytest.raises(CommplaneError, match="token"):
            writer.connect("reader", mixed)


def test_more_strangers_than_are_let_in_do_not_keep_writers_out() -> None:
    with opened("reader") as (engine, pool), contextlib.ExitStack() as stack:
        found = known(engine)
        for _ in range(receiving._MOST_STRANGERS + 40):
            stack.enter_context(socket.create_connection((found.host, found.port), timeout=5.0)).sendall(b"C")
        serves(engine, pool)


def test_a_stranger_who_drips_has_no_longer_than_one_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "_HANDSHAKE_SECONDS", 0.5)
    with opened("reader") as (engine, _):
        found = known(engine)
        with socket.create_connection((found.host, found.port), timeout=5.0) as stream:
            sent = 0
            with contextlib.suppress(OSError):
                while sent < 60:  # bytes after which it would be known for a stranger
                    stream.sendall(b"C")
                    sent += 1
                    time.sleep(0.1)
            assert sent < 60


def test_a_listener_that_drips_has_no_longer_than_one_that_is_silent() -> None:
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()
    challenge, sent = wire.CHALLENGE_MAGIC + bytes(32), bytearray()

    def drip() -> None:
        stream, _ = listener.accept()
        with stream, contextlib.suppress(OSError):
            for byte in challenge:
                stream.sendall(bytes([byte]))
                sent.append(byte)
                if over.wait(0.1):
                    return

    thread = threading.Thread(target=drip)
    thread.start()
    hello = wire.Hello("writer", new_session())
    try:
        with pytest.raises(PeerError, match="cannot be reached: timed out"):
            connect_stream(listener.getsockname(), bytes(32), hello, "reader", 0, time.monotonic() + 0.5)
        assert len(sent) < len(challenge)
    finally:
        over.set()
        thread.join(5.0)
        listener.close()


@contextlib.contextmanager
def slow_link(engine: Tcp, bytes_a_second: float) -> Iterator[tuple[bytes, threading.Event]]:
    """Metadata of `engine` over a link that takes so many bytes, and an event that cuts nothing but lets nothing through."""
    found, standstill, over = known(engine), threading.Event(), threading.Event()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    there = socket.create_connection((found.host, found.port), timeout=5.0)
    threads = []

    def pump(source: socket.socket, sink: socket.socket, rate: float | None) -> None:
        with contextlib.suppress(OSError):
            while not over.is_set() and (data := source.recv(16_384)):
                while standstill.is_set() and not over.wait(0.01):
                    pass
                if rate is not None:
                    time.sleep(len(data) / rate)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        here, _ = listener.accept()
        there.settimeout(None)
        back = threading.Thread(target=pump, args=(there, here, None))
        back.start()
        pump(here, there, bytes_a_second)
        back.join()
        here.close()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    try:
        port = int(listener.getsockname()[1])
        yield seal("tcp", 1, TcpMetadata("127.0.0.1", port, found.token, found.nbytes)), standstill
    finally:
        over.set()
        with contextlib.suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)
        threads[0].join(10)
        there.close()
        listener.close()


def test_a_link_that_takes_longer_for_a_batch_than_a_peer_may_be_silent_is_no_lost_peer_until_it_stands_still() -> None:
    nbytes = 1 << 20  # one batch: the least that a transfer is cut into
    with contextlib.ExitStack() as stack:
        engines = []
        for name in ("reader", "writer"):
            engine = Tcp()
            stack.callback(engine.close)
            engine.open(TransferContext(name, timeout=0.8, options={"streams": 1, "buffer": 65_536}))
            engine.register(engine.allocate(nbytes))
            engines.append(engine)
        reader, writer = engines
        writer.pool[:] = random.Random(5).randbytes(nbytes)
        made, standstill = stack.enter_context(slow_link(reader, 500_000))
        writer.connect("reader", made)
        writer.submit("reader", [0], [0], nbytes)
        assert [moved.error for moved in writer.poll(20.0)] == [None]
        assert bytes(reader.pool) == bytes(writer.pool)
        standstill.set()
        writer.submit("reader", [0], [0], nbytes)
        assert "acknowledged nothing for 0.8 s" in str(writer.poll(20.0)[0].error)


def test_a_stream_that_breaks_off_inside_of_a_piece_leaves_the_others_alone() -> None:
    with opened("reader") as (engine, pool):
        with stream_to(engine) as stream:
            stream.sendall(wire.pack_batch(1, [(100, 1000)]) + b"\xee" * 10)
        serves(engine, pool)


def test_an_answer_for_what_was_not_sent_loses_the_peer() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    token = bytes(range(32))
    made = seal("tcp", 1, TcpMetadata("127.0.0.1", listener.getsockname()[1], token, SIZE))
    engine = Tcp()
    engine.open(TransferContext("writer", timeout=5.0, options={"streams": 1}))
    engine.register(engine.allocate(SIZE))
    try:

        def lie() -> None:
            stream, _ = listener.accept()
            nonce = bytes(32)
            stream.sendall(wire.CHALLENGE_MAGIC + nonce)
            hello = wire.receive_hello(stream, token, nonce)
            stream.sendall(wire.CHALLENGE_MAGIC + wire.proof_of_listener(token, nonce, hello))
            wire.receive_batch(stream, SIZE)
            stream.sendall(wire.pack_answer(1, 1 << 40))
            until_closed(stream)
            stream.close()

        thread = threading.Thread(target=lie)
        thread.start()
        engine.connect("liar", made)
        ticket = engine.submit("liar", [0], [0], SIZE)
        ends = engine.poll(5.0)
        assert [m.ticket for m in ends] == [ticket] and "that were not sent" in str(ends[0].error)
        with pytest.raises(CommplaneError, match="connect to it again"):
            engine.submit("liar", [0], [0], SIZE)
    finally:
        engine.close()
        thread.join(5.0)
        listener.close()


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"wants IPv6 on the loopback interface: {error}")
    with opened("reader", "::1") as (engine, pool), opened("writer", "::1") as (writer, source):
        source[:] = random.Random(4).randbytes(SIZE)
        writer.connect("reader", engine.metadata())
        writer.submit("reader", [0], [0], SIZE)
        assert writer.poll(5.0)[0].error is None
        assert bytes(pool) == bytes(source)


def test_an_address_that_peers_cannot_reach_is_refused() -> None:
    with pytest.raises(CommplaneError, match="wanted a host that peers reach"):
        Tcp().open(TransferContext("end", host="0.0.0.0"))


def test_nobody_listens() -> None:
    with opened("reader") as (engine, _):
        made = engine.metadata()
    with opened("writer") as (writer, _), pytest.raises(PeerError, match="cannot be reached"):
        writer.connect("reader", made)
