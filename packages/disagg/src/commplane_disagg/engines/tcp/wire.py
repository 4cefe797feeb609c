"""What goes over a stream, and the checks of whatever comes.

The end whose pool is written listens. It sends a challenge; the writer answers with its name and a MAC over the challenge with
the token of the metadata as its key; the listener proves with another MAC that it has the token too. Neither sends the token.
Then the writer sends batches: a head with a checksum, a table of offsets and sizes, and the bytes of all pieces one after the
other. The listener answers each batch when its bytes are in memory.
"""

from __future__ import annotations

import hmac
import socket
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from commplane.errors import CommplaneError

__all__ = [
    "ANSWER_BYTES",
    "MOST_BATCH_BYTES",
    "MOST_PIECES",
    "Hello",
    "WireError",
    "pack_answer",
    "pack_batch",
    "pack_refusal",
    "proof_of_listener",
    "proof_of_writer",
    "read_answer",
    "receive_batch",
    "receive_exactly",
    "receive_hello",
]

VERSION = 1
NONCE_BYTES = 32
TOKEN_BYTES = 32
MAC_BYTES = 32
SESSION_BYTES = 16
MOST_NAME_BYTES = 512
MOST_PIECES = 512
MOST_BATCH_BYTES = 64 << 20

_HELLO = struct.Struct("!8sHH16s32s")  # magic, version, bytes of the name, session, MAC
_HELLO_MAGIC = b"CPXTCP1W"
CHALLENGE_MAGIC = b"CPXTCP1L"
_BATCH = struct.Struct("!4sIQQ")  # magic, pieces, ticket, bytes of all pieces
_BATCH_MAGIC = b"CPXb"
_CHECKSUM = struct.Struct("!I")
_PIECE = struct.Struct("!QQ")  # offset, bytes
_ANSWER = struct.Struct("!4sQQ")  # magic, ticket, bytes that are in memory; or magic, 0, bytes of a text that follows
_DONE_MAGIC, _REFUSED_MAGIC = b"CPXd", b"CPXr"
ANSWER_BYTES = _ANSWER.size
_MOST_REFUSAL_BYTES = 1024


class WireError(CommplaneError):
    """What came is not what this protocol allows; the stream is closed."""


class Ended(Exception):
    """The other end closed the stream."""


@dataclass(frozen=True)
class Hello:
    """Who writes. The streams of one `connect` share a session."""

    name: str
    session: bytes

    def pack(self, mac: bytes) -> bytes:
        """For the wire."""
        name = self.name.encode()
        return _HELLO.pack(_HELLO_MAGIC, VERSION, len(name), self.session, mac) + name


def proof_of_writer(token: bytes, nonce: bytes, hello: Hello) -> bytes:
    """What only a holder of the token can answer to `nonce`."""
    return hmac.digest(token, b"writer" + nonce + hello.session + hello.name.encode(), "sha256")


def proof_of_listener(token: bytes, nonce: bytes, hello: Hello) -> bytes:
    """What the listener answers."""
    return hmac.digest(token, b"listener" + nonce + hello.session + hello.name.encode(), "sha256")


def receive_exactly(stream: socket.socket, nbytes: int, until: float | None = None) -> bytes:
    """Small things of the protocol.

    Args:
        stream: whose timeout is set, if there is a deadline.
        nbytes: wanted.
        until: deadline for all of them, of `time.monotonic`; the stream's own timeout begins anew with each byte.

    Raises:
        Ended: the stream ended first.
        TimeoutError: they did not come in time.
    """
    out = b""
    while len(out) < nbytes:
        if until is not None:
            if (rest := until - time.monotonic()) <= 0:
                raise TimeoutError("timed out")
            stream.settimeout(rest)
        more = stream.recv(nbytes - len(out), socket.MSG_WAITALL)
        if not more:
            raise Ended
        out += more
    return out


def receive_hello(stream: socket.socket, token: bytes, nonce: bytes, until: float | None = None) -> Hello:
    """Who is there, proved, by `until` of `time.monotonic`.

    Raises:
        WireError: it is no writer of this protocol, or has not got the token.
    """
    magic, version, name_bytes, session, mac = _HELLO.unpack(receive_exactly(stream, _HELLO.size, until))
    if magic != _HELLO_MAGIC or version != VERSION or not 0 < name_bytes <= MOST_NAME_BYTES:
        raise WireError(f"wanted a writer of protocol version {VERSION}, found {magic!r} version {version}")
    try:
        hello = Hello(receive_exactly(stream, name_bytes, until).decode(), session)
    except UnicodeDecodeError as error:
        raise WireError(f"wanted a name in UTF-8, {error}") from error
    if not hmac.compare_digest(mac, proof_of_writer(token, nonce, hello)):
        raise WireError("wanted a proof of the token, found another: the metadata is of an earlier start, ask it anew")
    return hello


def pack_batch(ticket: int, pieces: Sequence[tuple[int, int]]) -> bytes:
    """Head and table of a batch: offset in the listener's pool, and size, of each piece."""
    head = _BATCH.pack(_BATCH_MAGIC, len(pieces), ticket, sum(nbytes for _, nbytes in pieces))
    table = b"".join(_PIECE.pack(offset, nbytes) for offset, nbytes in pieces)
    return head + _CHECKSUM.pack(zlib.crc32(table, zlib.crc32(head))) + table


def receive_batch(stream: socket.socket, pool_bytes: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Ticket, bytes, and offset and size of each piece, all of them inside of the pool. The bytes themselves are still to come.

    Raises:
        Ended: the stream ended between batches, or inside of one.
        WireError: the head or the table is not whole, or a piece lies outside of the pool.
    """
    head = receive_exactly(stream, _BATCH.size + _CHECKSUM.size)
    magic, count, ticket, total = _BATCH.unpack_from(head)
    if magic != _BATCH_MAGIC or not 0 < count <= MOST_PIECES or not 0 < total <= MOST_BATCH_BYTES:
        raise WireError(f"wanted the head of a batch, found {magic!r} with {count} pieces of {total} bytes")
    table = receive_exactly(stream, _PIECE.size * count)
    if zlib.crc32(table, zlib.crc32(head[: _BATCH.size])) != _CHECKSUM.unpack_from(head, _BATCH.size)[0]:
        raise WireError("a batch's table does not fit its checksum")
    pieces = list(_PIECE.iter_unpack(table))
    for offset, nbytes in pieces:
        if not 0 < nbytes <= total or offset + nbytes > pool_bytes:
            raise WireError(f"wanted pieces inside of the pool of {pool_bytes} bytes, found {nbytes} bytes at {offset}")
    if sum(nbytes for _, nbytes in pieces) != total:
        raise WireError(f"wanted pieces of {total} bytes together, found {sum(n for _, n in pieces)}")
    return ticket, total, pieces


def pack_answer(ticket: int, nbytes: int) -> bytes:
    """A batch of `ticket` with that many bytes is in memory."""
    return _ANSWER.pack(_DONE_MAGIC, ticket, nbytes)


def pack_refusal(reason: str) -> bytes:
    """Why the listener closes the stream."""
    text = reason.encode()[:_MOST_REFUSAL_BYTES]
    return _ANSWER.pack(_REFUSED_MAGIC, 0, len(text)) + text


def read_answer(buffer: bytes) -> tuple[int, int, int]:
    """The first answer in `buffer`: its ticket, how many bytes are in memory, and how long it is; all 0 if it is not whole.

    Raises:
        WireError: the listener refused what was sent, and says why; or it is no answer.
    """
    if len(buffer) < _ANSWER.size:
        return 0, 0, 0
    magic, ticket, nbytes = _ANSWER.unpack_from(buffer)
    if magic == _DONE_MAGIC:
        return ticket, nbytes, _ANSWER.size
    if magic != _REFUSED_MAGIC or nbytes > _MOST_REFUSAL_BYTES:
        raise WireError(f"wanted an answer to a batch, found {magic!r}")
    if len(buffer) < _ANSWER.size + nbytes:
        return 0, 0, 0
    raise WireError(f"it refused what was sent: {buffer[_ANSWER.size : _ANSWER.size + nbytes].decode(errors='replace')}")
