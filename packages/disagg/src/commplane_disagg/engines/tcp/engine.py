"""Both ends of TCP in one engine, and the thread that hears answers and keeps deadlines."""

from __future__ import annotations

import os
import selectors
import socket
import threading
from typing import ClassVar

import msgspec

from commplane.api import TransferContext
from commplane.errors import CommplaneError
from commplane_disagg.engines.base import PoolEngine, option
from commplane_disagg.engines.envelope import seal, unseal
from commplane_disagg.engines.pieces import Pieces
from commplane_disagg.engines.tcp import wire
from commplane_disagg.engines.tcp.receiving import Listener
from commplane_disagg.engines.tcp.sending import Outgoing, connect_stream, new_session

__all__ = ["Tcp", "TcpMetadata"]

_VERSION = 1
_WILDCARDS = ("", "0.0.0.0", "::", "*")


class TcpMetadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a peer has to know: where to connect to, the token that lets it write, and how large the pool is."""

    host: str
    port: int
    token: bytes
    nbytes: int


class _Watch:
    """One thread that hears the answers of all peers, and gives up on one that is silent for too long."""

    def __init__(self, name: str, timeout: float) -> None:
        self._timeout = timeout
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._to_add: list[Outgoing] = []
        self._to_forget: tuple[Outgoing, threading.Event] | None = None
        self._peers: list[Outgoing] = []
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"commplane-tcp-watch {name}", daemon=True)
        self._thread.start()

    def add(self, peer: Outgoing) -> None:
        """Hear this one, too; until it is lost."""
        with self._lock:
            self._to_add.append(peer)
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """After all peers were lost."""
        self._is_closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._selector.close()
        os.close(self._wake)

    def forget(self, peer: Outgoing) -> None:
        """Returns when the thread does not look at its sockets any more. After `lose`."""
        done = threading.Event()
        with self._lock:
            self._to_forget = (peer, done)  # one at a time: the engine's caller waits
        os.eventfd_write(self._wake, 1)
        done.wait(self._timeout)

    def _run(self) -> None:
        tick = min(0.25, self._timeout / 8)
        while not self._is_closing:
            self._change()
            for key, _ in self._selector.select(tick if self._peers else None):
                if key.fd == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    key.data.hear(key.fileobj)
            for peer in self._peers:
                if peer.silent_for() > self._timeout:
                    peer.lose(
                        f"peer {peer.peer!r} is lost: it acknowledged nothing for {self._timeout:g} s, it is stopped or the "
                        f"network between is down"
                    )
            for peer in [p for p in self._peers if p.why_lost is not None]:
                self._drop(peer)

    def _change(self) -> None:
        with self._lock:
            for peer in self._to_add:
                self._peers.append(peer)
                for stream in peer.streams:
                    self._selector.register(stream, selectors.EVENT_READ, peer)
            self._to_add.clear()
            forget, self._to_forget = self._to_forget, None
        if forget is not None:
            self._drop(forget[0])
            forget[1].set()

    def _drop(self, peer: Outgoing) -> None:
        if peer in self._peers:
            self._peers.remove(peer)
            for stream in peer.streams:
                self._selector.unregister(stream)


class Tcp(PoolEngine):
    """One end.

    Options: ``streams``, how many connections to a peer (default by the number of cores); ``buffer``, bytes of the kernel's
    buffer of each, 0 to let the kernel choose; ``port`` to listen at, 0 for any; ``bind``, the address to listen at where it is
    not the one that peers reach.
    """

    name: ClassVar[str] = "tcp"
    options = ("streams", "buffer", "port", "bind")

    def __init__(self) -> None:
        super().__init__()
        self._listener: Listener | None = None
        self._watch: _Watch | None = None
        self._peers: dict[str, tuple[Outgoing, bytes]] = {}
        self._streams = 0
        self._buffer = 0

    def open(self, context: TransferContext) -> None:
        """Listen."""
        super().open(context)
        try:
            self._streams = option(context, self.name, "streams", min(8, max(2, os.cpu_count() or 1)))
            self._buffer = option(context, self.name, "buffer", 1 << 20)
            bind = option(context, self.name, "bind", context.host)
            port = option(context, self.name, "port", 0)
            if context.host in _WILDCARDS:
                raise CommplaneError(f"engine 'tcp' of {context.name!r}: wanted a host that peers reach, found {context.host!r}")
            if not 1 <= self._streams <= 64 or self._buffer < 0:
                raise CommplaneError(
                    f"engine 'tcp': wanted 1 to 64 streams, buffer 0 or more, found {self._streams}, {self._buffer}"
                )
            if len(context.name.encode()) > wire.MOST_NAME_BYTES or not context.name:
                raise CommplaneError(f"engine 'tcp': wanted a name of 1 to {wire.MOST_NAME_BYTES} bytes, found {context.name!r}")
            self._listener = self._listen(bind, port)
        except CommplaneError:
            self._context = None
            raise
        self._watch = _Watch(context.name, context.timeout)

    def _listen(self, host: str, port: int) -> Listener:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            return Listener(found[0], found[4], self._buffer, self.context.name)  # type: ignore[arg-type]
        except (OSError, UnicodeError) as error:  # the latter for a name with an empty label, or too long a one
            raise CommplaneError(
                f"engine 'tcp' of {self.context.name!r} cannot listen at {host!r} port {port}: {error}; give it an address of "
                f"this machine"
            ) from error

    def register(self, pool: memoryview) -> None:
        """Take streams from now on."""
        super().register(pool)
        assert self._listener is not None
        self._listener.serve(self.pool)

    def metadata(self) -> bytes:
        """The address and the token."""
        nbytes = self.pool.nbytes
        assert self._listener is not None
        return seal(self.name, _VERSION, TcpMetadata(self.context.host, self._listener.port, self._listener.token, nbytes))

    def connect(self, peer: str, metadata: bytes) -> None:
        """Open the streams."""
        pool = self.pool
        found = unseal(self.name, _VERSION, TcpMetadata, metadata, peer)
        if not 0 < found.port < 65536 or found.nbytes <= 0 or len(found.token) != wire.TOKEN_BYTES:
            raise CommplaneError(
                f"metadata of peer {peer!r}: wanted a port, a pool and a token, found {found.port}, {found.nbytes}"
            )
        if peer in self._peers:
            outgoing, known = self._peers[peer]
            if known == metadata and outgoing.why_lost is None:
                return
            self._leave(peer)
        until, hello, streams = self._until(), wire.Hello(self.context.name, new_session()), list[socket.socket]()
        try:
            for _ in range(self._streams):
                streams.append(connect_stream((found.host, found.port), found.token, hello, peer, self._buffer, until))
        except CommplaneError:
            for stream in streams:
                stream.close()
            raise
        outgoing = Outgoing(peer, streams, pool, found.nbytes, self._ends)
        self._peers[peer] = (outgoing, bytes(metadata))
        assert self._watch is not None
        self._watch.add(outgoing)

    def _remote_pool(self, peer: str) -> int:
        outgoing, _ = self._peers.get(peer, (None, b""))
        if outgoing is None:
            raise CommplaneError(f"peer {peer!r} is not connected to {self.context.name!r}: call connect first")
        if outgoing.why_lost is not None:
            raise CommplaneError(f"{outgoing.why_lost}; connect to it again")
        return outgoing.pool_bytes

    def _start(self, peer: str, ticket: int, pieces: Pieces) -> None:
        self._peers[peer][0].start(ticket, pieces)

    def cancel(self, ticket: int) -> None:
        """What is under way arrives."""
        peer = self._ends.peer_of(ticket)
        if peer is not None and peer in self._peers:
            self._peers[peer][0].cancel(ticket)

    def _leave(self, peer: str) -> None:
        outgoing, _ = self._peers.pop(peer)
        outgoing.lose(f"peer {peer!r} was disconnected")
        assert self._watch is not None
        self._watch.forget(outgoing)
        outgoing.close()

    def disconnect(self, peer: str) -> None:
        """Of both directions: afterwards nothing of the peer's can land here either."""
        if peer in self._peers:
            self._leave(peer)
        if self._listener is not None:
            self._listener.fence(peer)

    def close(self) -> None:
        """Peers that write here learn of it."""
        if self._context is None:
            return
        for peer in list(self._peers):
            self._leave(peer)
        if self._watch is not None:
            self._watch.close()
        if self._listener is not None:
            self._listener.close()
        self._watch, self._listener, self._pool, self._context = None, None, None, None
