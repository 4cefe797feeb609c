"""The end whose pool is written: a listener, and a thread for each stream that puts bytes where the writer says.

Whatever bytes come, nothing outside of the pool is written, and nothing inside of it before the writer has proved the token. A
wrong batch closes its stream and no other.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field

from commplane_disagg.engines.tcp import wire

__all__ = ["Listener", "tune"]

_HANDSHAKE_SECONDS = 10.0
_MOST_STRANGERS = 256
"""Streams at once that have not proved the token. The oldest one has to go for the next, once it has had `_GRACE_SECONDS`."""
_GRACE_SECONDS = 1.0


def tune(stream: socket.socket, buffer_bytes: int) -> None:
    """Set what both ends of a stream want."""
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    if buffer_bytes:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)


@dataclass(eq=False)
class _Incoming:
    """One stream that bytes come over. `hello` is None until the writer has proved who it is."""

    socket: socket.socket
    born: float = field(default_factory=time.monotonic)
    hello: wire.Hello | None = None
    is_closed: bool = False
    thread: threading.Thread = field(init=False)

    def close(self) -> None:
        """Wake its thread, which ends before it writes anything more. Any thread."""
        self.is_closed = True
        with contextlib.suppress(OSError):  # the writer has closed it first
            self.socket.shutdown(socket.SHUT_RDWR)


class Listener:
    """Takes streams and writes into the pool, until it is closed.

    Args:
        family: of the address.
        address: where to listen; port 0 for any.
        buffer_bytes: of the kernel for each stream and direction; 0 leaves it to the kernel.
        name: of this end, for its threads.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, family: int, address: tuple[str, int], buffer_bytes: int, name: str) -> None:
        self.token = secrets.token_bytes(wire.TOKEN_BYTES)
        self._name = name
        self._buffer_bytes = buffer_bytes
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if buffer_bytes:  # before the handshake, which fixes the scale of the window
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            self._socket.bind(address)
            self._socket.listen(256)
        except OSError:
            self._socket.close()
            raise
        self.port = int(self._socket.getsockname()[1])
        self._lock = threading.Lock()
        self._streams: set[_Incoming] = set()
        self._closing = threading.Event()
        self._pool: memoryview | None = None
        self._thread: threading.Thread | None = None

    def serve(self, pool: memoryview) -> None:
        """Begin to take streams."""
        self._pool = pool
        self._thread = threading.Thread(target=self._accept, name=f"commplane-tcp-accept {self._name}", daemon=True)
        self._thread.start()

    def fence(self, peer: str, session: bytes | None = None) -> None:
        """Close the streams of the writer `peer`, but those of `session`, and wait until nothing of them can land."""
        with self._lock:
            theirs = [s for s in self._streams if s.hello is not None and s.hello.name == peer and s.hello.session != session]
        self._end(theirs)

    def close(self) -> None:
        """Close everything, and wait for the threads."""
        self._closing.set()
        # On Linux this wakes a thread in accept.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        self._socket.close()
        with self._lock:
            streams = list(self._streams)
        self._end(streams)

    def _end(self, streams: list[_Incoming]) -> None:
        for stream in streams:
            stream.close()
        for stream in streams:
            if stream.thread is not threading.current_thread():
                stream.thread.join()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with self._lock:
                oldest = self._oldest_of_too_many()
            if oldest is not None and time.monotonic() - oldest.born < _GRACE_SECONDS:
                self._closing.wait(0.02)  # it may be about to speak: who comes now waits in the kernel's queue
                continue
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or out of descriptors: who connects sees its own deadline
                self._closing.wait(0.05)
                continue
            stream = _Incoming(connection)
            stream.thread = threading.Thread(
                target=self._serve, args=(stream,), name=f"commplane-tcp-in {self._name}", daemon=True
            )
            with self._lock:  # again: it may have proved the token while nobody came
                oldest = self._oldest_of_too_many()
                if oldest is not None:
                    oldest.close()
                self._streams.add(stream)
            stream.thread.start()

    def _oldest_of_too_many(self) -> _Incoming | None:
        """The stranger who has to go for the next one; None while there is room. With the lock held."""
        strangers = [s for s in self._streams if s.hello is None and not s.is_closed]
        return min(strangers, key=lambda s: s.born) if len(strangers) >= _MOST_STRANGERS else None

    def _serve(self, stream: _Incoming) -> None:
        try:
            self._greet(stream)
            self._receive(stream)
        except wire.WireError as error:
            with contextlib.suppress(OSError):
                stream.socket.send(wire.pack_refusal(str(error)), socket.MSG_DONTWAIT)
        except (wire.Ended, OSError):
            pass  # the writer has gone, or this end is closing: either way its tickets end over there
        finally:
            with self._lock:
                self._streams.discard(stream)
            stream.socket.close()

    def _greet(self, stream: _Incoming) -> None:
        tune(stream.socket, self._buffer_bytes)
        until = stream.born + _HANDSHAKE_SECONDS
        stream.socket.settimeout(_HANDSHAKE_SECONDS)
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        stream.socket.sendall(wire.CHALLENGE_MAGIC + nonce)
        hello = wire.receive_hello(stream.socket, self.token, nonce, until)
        # A writer that was started again, or connects again: what its earlier streams still hold must not land later.
        self.fence(hello.name, hello.session)
        with self._lock:
            stream.hello = hello
        stream.socket.settimeout(None)
        stream.socket.sendall(wire.CHALLENGE_MAGIC + wire.proof_of_listener(self.token, nonce, hello))

    def _receive(self, stream: _Incoming) -> None:
        pool = self._pool
        assert pool is not None
        while True:
            ticket, total, pieces = wire.receive_batch(stream.socket, pool.nbytes)
            views = [pool[offset : offset + nbytes] for offset, nbytes in pieces]
            while views:
                if stream.is_closed:
                    return
                if len(views) == 1:
                    got = stream.socket.recv_into(views[0], 0, socket.MSG_WAITALL)
                else:
                    got = stream.socket.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
                if not got:
                    return
                views = left(views, got)
            stream.socket.sendall(wire.pack_answer(ticket, total))


def left(views: list[memoryview], done: int) -> list[memoryview]:
    """What of `views` is still to come or to go after `done` bytes."""
    for index, view in enumerate(views):
        if done < view.nbytes:
            return [view[done:], *views[index + 1 :]]
        done -= view.nbytes
    return []
