"""One connection: from its first byte through the handshake to its close. It never blocks; its channel tells it when to move."""

from __future__ import annotations

import enum
import selectors
import socket
from collections import deque

from commplane.errors import CommplaneError
from commplane_disagg.channel import messages as m
from commplane_disagg.channel.frames import FrameReader, frame
from commplane_disagg.channel.proof import nonce, prove, proves

__all__ = ["Link", "Stage"]

STRANGER_LIMIT = 4 << 10
"""Longest frame of who has not shown that it knows the token, in bytes."""

FRAME_LIMIT = 8 << 20
"""Longest frame of a peer, in bytes: a `Want` of a million pages."""

BACKLOG_LIMIT = 64 << 20
"""Bytes that may wait for a peer that does not read."""

_CHUNK = 256 << 10


class Stage(enum.Enum):
    """How far a connection is."""

    CONNECTING = "connecting"
    HANDSHAKE = "handshake"
    CARD = "card"
    UP = "up"
    CLOSED = "closed"


class Link:
    """A connection of this end, dialled or accepted.

    Attributes:
        wanted: the name that who was dialled must have; None for an accepted one.
        peer: who is there, once its proof was right.
        card: the peer's, once up.
        heard: when the last byte came, by the channel's clock.
        said: when the last message was sent.
        why: it was closed, or "".
        ended: the peer said that it is closed for good.
        watched: what its channel's selector looks for.
    """

    def __init__(
        self, sock: socket.socket, *, mine: m.Identity, card: bytes, token: bytes | None, now: float, wanted: str | None = None
    ) -> None:
        self.sock = sock
        self.wanted = wanted
        self.peer: m.Identity | None = None
        self.card = b""
        self.born = self.heard = self.said = now
        self.why = ""
        self.ended = False
        self.watched = selectors.EVENT_READ | selectors.EVENT_WRITE
        self.stage = Stage.HANDSHAKE if wanted is None else Stage.CONNECTING
        self._mine, self._my_card, self._token = m.encode_identity(mine), card, token
        self._reader = FrameReader(STRANGER_LIMIT)
        self._out: deque[memoryview] = deque()
        self._waiting = 0
        self._nonce, self._their_nonce = nonce(), b""
        if wanted is None:
            self.send(m.Challenge(m.VERSION, self._nonce), now)

    @property
    def wants_to_write(self) -> bool:
        """Whether bytes wait, or the connection is not made yet."""
        return bool(self._out) or self.stage is Stage.CONNECTING

    def send(self, message: m.Message, now: float) -> None:
        """Queue a message. A peer that lets too much wait is cut off."""
        if self.stage is Stage.CLOSED:
            return
        body = frame(m.encode(message))
        self._out.append(memoryview(body))
        self._waiting += len(body)
        self.said = now
        if self._waiting > BACKLOG_LIMIT:
            self.close(f"{self._waiting} bytes wait for it, more than {BACKLOG_LIMIT}")

    def write(self) -> None:
        """Write what the socket takes."""
        try:
            if self.stage is Stage.CONNECTING:
                error = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, f"connect failed with error {error}")
                self.stage = Stage.HANDSHAKE
            while self._out:
                sent = self.sock.send(self._out[0])
                self._waiting -= sent
                if sent < len(self._out[0]):
                    self._out[0] = self._out[0][sent:]
                    return
                self._out.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self.close(f"connection lost: {error}")

    def read(self, now: float) -> list[m.Message]:
        """Messages for the ends above; the handshake is dealt with here. What breaks the rules closes this link alone."""
        try:
            data = self.sock.recv(_CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            self.close(f"connection lost: {error}")
            return []
        if not data:
            self.close("connection closed by the peer")
            return []
        self.heard = now
        out: list[m.Message] = []
        try:
            for body in self._reader.feed(data):
                message = m.decode(body)
                if isinstance(message, m.Bye):
                    self.ended = message.ended and self.stage is Stage.UP
                    self.close(f"peer left: {message.why}" if message.why else "peer left")
                elif self.stage is not Stage.UP:
                    self._handshake(message, now)
                elif isinstance(message, m.Challenge | m.Hello | m.Welcome | m.Card):
                    raise CommplaneError(f"a {type(message).__name__.lower()} came after the handshake")
                elif not isinstance(message, m.Beat):
                    out.append(message)
                if self.stage is Stage.CLOSED:
                    break
        except CommplaneError as error:
            self.refuse(str(error), now)
        return out

    def refuse(self, why: str, now: float, *, ended: bool = False) -> None:
        """Close, and tell the peer why as far as it still listens."""
        self.send(m.Bye(why[:500], ended), now)
        self.write()
        self.close(why)

    def close(self, why: str) -> None:
        """Say and hear nothing more. Idempotent; the first reason stays. The channel closes the socket once it is not watched."""
        if self.stage is not Stage.CLOSED:
            self.stage, self.why = Stage.CLOSED, why

    def _handshake(self, message: m.Message, now: float) -> None:
        if (
            self.stage is Stage.HANDSHAKE
            and self.wanted is not None
            and isinstance(message, m.Challenge)
            and not self._their_nonce
        ):
            _check_version(message.version)
            self._their_nonce = message.nonce
            proof = prove(self._token, "hello", message.nonce, self._nonce, self._mine)
            self.send(m.Hello(m.VERSION, self._nonce, self._mine, proof), now)
        elif self.stage is Stage.HANDSHAKE and self.wanted is None and isinstance(message, m.Hello):
            _check_version(message.version)
            if not proves(message.proof, self._token, "hello", self._nonce, message.nonce, message.identity):
                raise CommplaneError("the peer does not know this end's token; both ends must be given the same")
            self._trust(message.identity)
            self.send(m.Welcome(self._mine, prove(self._token, "welcome", self._nonce, message.nonce, self._mine)), now)
            self.send(m.Card(self._my_card), now)
        elif self.stage is Stage.HANDSHAKE and self.wanted is not None and isinstance(message, m.Welcome) and self._their_nonce:
            if not proves(message.proof, self._token, "welcome", self._their_nonce, self._nonce, message.identity):
                raise CommplaneError("the end that answers does not know this end's token; both ends must be given the same")
            self._trust(message.identity)
            if self.peer is not None and self.peer.name != self.wanted:
                raise CommplaneError(f"this address belongs to {self.peer.name!r}, wanted {self.wanted!r}; look it up again")
            self.send(m.Card(self._my_card), now)
        elif self.stage is Stage.CARD and isinstance(message, m.Card):
            self.card = message.body
            self.stage = Stage.UP
        else:
            raise CommplaneError(f"a {type(message).__name__.lower()} came out of turn, in stage {self.stage.value}")

    def _trust(self, identity: bytes) -> None:
        self.peer = m.decode_identity(identity)
        self.stage = Stage.CARD
        self._reader.limit = FRAME_LIMIT


def _check_version(version: int) -> None:
    if version != m.VERSION:
        raise CommplaneError(f"the channel speaks version {m.VERSION}, the peer {version}; upgrade the older end")
