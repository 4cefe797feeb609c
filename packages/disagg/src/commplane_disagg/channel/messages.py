"""What ends say to each other about rooms: typed structs in msgpack, each with its tag. Never pickle.

`VERSION` is compared when two ends connect. A field that is added later stands last and has a default.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from commplane.errors import CommplaneError

__all__ = [
    "MOST_NUMBER",
    "VERSION",
    "Abort",
    "Ack",
    "Beat",
    "Bye",
    "Card",
    "Challenge",
    "Drained",
    "Ended",
    "Failed",
    "Hello",
    "Identity",
    "Inquire",
    "Message",
    "Want",
    "Welcome",
    "Written",
    "decode",
    "decode_identity",
    "encode",
    "encode_identity",
]

VERSION = 1

MOST_NUMBER = (1 << 63) - 1
"""The greatest number, and the greatest generation, of a room."""

_Name = Annotated[str, Meta(min_length=1, max_length=128)]
_Text = Annotated[str, Meta(max_length=512)]
_Room = Annotated[int, Meta(ge=0, le=MOST_NUMBER)]
_Generation = Annotated[int, Meta(ge=0, le=MOST_NUMBER)]
_Count = Annotated[int, Meta(ge=0, le=1 << 53)]
_Proof = Annotated[bytes, Meta(max_length=32)]
_Nonce = Annotated[bytes, Meta(min_length=16, max_length=64)]


class Identity(Struct, frozen=True, kw_only=True):
    """Which process an end is.

    Attributes:
        name: of the end, unique among all that may meet; also the engine's name for it.
        instance: random, new after each start.
        machine: boot id and pid namespace; equal where `pid` means the same.
        pid: of the process.
        started: when that process started, in ticks since boot, so that a pid that is used again is told apart.
    """

    name: _Name
    instance: _Name
    machine: _Text = ""
    pid: _Count = 0
    started: _Count = 0


class Challenge(Struct, frozen=True, tag="challenge"):
    """First word of who accepts: a number that the proofs are made of."""

    version: int
    nonce: _Nonce


class Hello(Struct, frozen=True, tag="hello"):
    """First word of who connects. `proof` shows that it knows the token."""

    version: int
    nonce: _Nonce
    identity: bytes
    proof: _Proof = b""


class Welcome(Struct, frozen=True, tag="welcome"):
    """The answer to a `Hello` whose proof is right."""

    identity: bytes
    proof: _Proof = b""


class Card(Struct, frozen=True, tag="card"):
    """What the ends have to know of each other before the first room; opaque to the channel. Each sends one, then it is up."""

    body: Annotated[bytes, Meta(max_length=1 << 18)] = b""


class Beat(Struct, frozen=True, tag="beat"):
    """I am there. Sent when nothing else was for a while."""


class Bye(Struct, frozen=True, tag="bye"):
    """An orderly close, or why a connection is refused. `ended`: this end is closed, its engine writes nothing any more."""

    why: _Text = ""
    ended: bool = False


class Inquire(Struct, frozen=True, tag="inquire"):
    """To an end on the same machine as a third process, which cannot be looked up from here: has that one ended?"""

    pid: _Count
    started: _Count


class Ended(Struct, frozen=True, tag="ended"):
    """The answer to an `Inquire`, if it has. There is no other answer."""

    pid: _Count
    started: _Count


class Want(Struct, frozen=True, tag="want"):
    """Decode to prefill: this room's pages go here. Said again after a reconnect; the same words mean the same.

    Attributes:
        pages: of the receiver's pool, in the order of its positions; empty for a dummy.
        length: pages of the whole request.
    """

    room: _Room
    generation: _Generation
    length: _Count
    pages: Annotated[list[_Count], Meta(max_length=1 << 20)] = []


class Written(Struct, frozen=True, tag="written"):
    """Prefill to decode: every byte that I owe to this room is in your pool, and I write nothing more for it."""

    room: _Room
    generation: _Generation
    pages: _Count = 0


class Ack(Struct, frozen=True, tag="ack"):
    """Decode to prefill: all my writers are done."""

    room: _Room
    generation: _Generation


class Failed(Struct, frozen=True, tag="failed"):
    """Prefill to decode: this room will not come. Whether writes are still under way is said by `Drained`.

    Attributes:
        reason: a number of `commplane_disagg.rooms.Reason`.
        origin: the end that failed first.
        text: what happened there.
    """

    room: _Room
    generation: _Generation
    reason: _Count
    origin: _Name
    text: _Text = ""


class Abort(Struct, frozen=True, tag="abort"):
    """Decode to prefill: give this room up and say `Drained` once no write can land any more. Fields as in `Failed`."""

    room: _Room
    generation: _Generation
    reason: _Count
    origin: _Name
    text: _Text = ""


class Drained(Struct, frozen=True, tag="drained"):
    """Prefill to decode: I started no write for this failed room, or all that I started have ended.

    `clean` is False where the engine cannot promise that a transfer which failed writes nothing later.
    """

    room: _Room
    generation: _Generation
    clean: bool


Message: TypeAlias = (
    Challenge | Hello | Welcome | Card | Beat | Bye | Want | Written | Ack | Failed | Abort | Drained | Inquire | Ended
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_identity_decoder: msgspec.msgpack.Decoder[Identity] = msgspec.msgpack.Decoder(Identity)


def encode(message: Message) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def encode_identity(identity: Identity) -> bytes:
    """An identity as the bytes that a proof covers."""
    return _encoder.encode(identity)


def decode_identity(body: bytes) -> Identity:
    """Read and check an identity. Raises what `decode` raises."""
    try:
        return _identity_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CommplaneError(f"an identity cannot be read: {error}") from error


def decode(body: bytes) -> Message:
    """Read and check one message.

    Raises:
        CommplaneError: it is none.
    """
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CommplaneError(f"a frame is no message of version {VERSION}: {error}") from error
