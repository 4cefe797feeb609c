"""A pool's file from one process to another: a socket in the abstract namespace, which vanishes with its process.

Whoever knows the address and the token, both of which are in the metadata, gets the file. The connection then stays open and
carries nothing: its end is how the writer learns that the owner of the pool is gone, also after ``kill -9``.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
import time

from commplane.errors import CommplaneError, PeerError

__all__ = ["Door", "is_gone", "knock"]

_TOKEN_BYTES = 32
_GREETING = struct.Struct("!8s")
_HELLO = b"CPX-SHM1"
_TOKEN_SECONDS = 5.0
_MOST_GUESTS = 4096


class Door:
    """Hands a file to whoever shows the token, from a thread of its own, until it is closed.

    Attributes:
        address: of the socket, without the zero byte in front.
        token: what a guest has to show.
    """

    def __init__(self, fd: int) -> None:
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self.address = f"commplane-shm-{secrets.token_hex(16)}"
        self._fd = fd
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._socket.bind("\0" + self.address)
        self._socket.listen(128)
        self._socket.setblocking(False)
        # Guests who have not shown the token yet, with what they sent so far and until when they may.
        self._waiting: dict[socket.socket, tuple[bytes, float]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="commplane-shm-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close every connection: writers learn that this end is gone. Waits for the thread."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _serve(self) -> None:
        try:
            while True:
                timeout = 1.0 if self._waiting else None
                for key, _ in self._selector.select(timeout):
                    if key.fileobj == self._wake:
                        return
                    if key.fileobj is self._socket:
                        self._let_in()
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._hear(key.fileobj)
                for guest in [g for g, (_, until) in self._waiting.items() if time.monotonic() > until]:
                    self._send_away(guest)
        finally:
            for key in list(self._selector.get_map().values()):
                if isinstance(key.fileobj, socket.socket):
                    key.fileobj.close()
            self._selector.close()

    def _let_in(self) -> None:
        try:
            guest, _ = self._socket.accept()
        except OSError:  # it has gone again, or there is no descriptor left: who waits tries until its own deadline
            return
        if len(self._selector.get_map()) >= _MOST_GUESTS:
            guest.close()
            return
        guest.setblocking(False)
        self._waiting[guest] = (b"", time.monotonic() + _TOKEN_SECONDS)
        self._selector.register(guest, selectors.EVENT_READ)

    def _hear(self, guest: socket.socket) -> None:
        wanted = _HELLO + self.token
        said, until = self._waiting.get(guest, (wanted, 0.0))
        try:
            more = guest.recv(len(wanted))
            if not more or len(said) + len(more) > len(wanted):
                self._send_away(guest)
                return
            said += more
            if len(said) < len(wanted):
                self._waiting[guest] = (said, until)
                return
            if not hmac.compare_digest(said, wanted):
                self._send_away(guest)
                return
            del self._waiting[guest]
            socket.send_fds(guest, [_GREETING.pack(_HELLO)], [self._fd])
        except OSError:
            self._send_away(guest)

    def _send_away(self, guest: socket.socket) -> None:
        self._waiting.pop(guest, None)
        self._selector.unregister(guest)
        guest.close()


def knock(address: str, token: bytes, peer: str, until: float) -> tuple[socket.socket, int]:
    """The open connection to a peer's door, and the file that it handed over; both are the caller's to close.

    Args:
        address: of the door.
        token: of its metadata.
        peer: for the texts of errors.
        until: of `time.monotonic`.

    Raises:
        PeerError: nobody is there, or it does not answer in time.
        CommplaneError: it refuses.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(max(0.001, until - time.monotonic()))
        connection.connect("\0" + address)
        connection.sendall(_HELLO + token)
        connection.settimeout(max(0.001, until - time.monotonic()))
        data, ancillary, _, _ = connection.recvmsg(
            _GREETING.size, socket.CMSG_SPACE(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except TimeoutError as error:
        connection.close()
        raise PeerError(f"peer {peer!r} did not hand over its pool in time: it is stopped, or too busy to answer") from error
    except OSError as error:
        connection.close()
        raise PeerError(f"peer {peer!r} is not there: {error}; connect with its new metadata if it was started again") from error
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if data != _GREETING.pack(_HELLO) or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        connection.close()
        raise CommplaneError(f"peer {peer!r} refused to hand over its pool: the metadata is of an earlier start, ask it anew")
    connection.setblocking(False)
    return connection, fds[0]


def is_gone(connection: socket.socket) -> bool:
    """Whether the owner of the pool has closed it or died. Does not wait."""
    with contextlib.suppress(BlockingIOError):
        try:
            return connection.recv(1, socket.MSG_PEEK) == b""
        except ConnectionError:
            return True
    return False
