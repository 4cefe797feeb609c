"""What all engines' metadata looks like: a head that names the engine, a checksum, and a body of the engine's own.

A peer that gets the metadata of another engine, of another version, or a part of it says so before it does anything else.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, TypeVar

import msgspec

from commplane.errors import CommplaneError

__all__ = ["LIMIT", "seal", "unseal"]

LIMIT = 65536
"""Bytes, of the whole."""

_HEAD = struct.Struct("!4s12sHII")  # magic, engine, version, checksum of the body, bytes of the body
_MAGIC = b"cpx\x01"

T = TypeVar("T", bound=msgspec.Struct)


def seal(engine: str, version: int, body: msgspec.Struct) -> bytes:
    """Metadata of `engine`.

    Raises:
        CommplaneError: it is above 64 KiB.
    """
    data = msgspec.msgpack.encode(body)
    out = _HEAD.pack(_MAGIC, engine.encode(), version, zlib.crc32(data), len(data)) + data
    if len(out) > LIMIT:
        raise CommplaneError(f"metadata of engine {engine!r}: wanted at most {LIMIT} bytes, found {len(out)}")
    return out


def unseal(engine: str, version: int, kind: type[T], metadata: bytes | memoryview, peer: str) -> T:
    """The body that `seal` was given.

    Raises:
        CommplaneError: it is not whole, of another engine or of another version; the text says which.
    """

    def wrong(found: Any) -> CommplaneError:
        return CommplaneError(f"metadata of peer {peer!r}: wanted that of engine {engine!r} version {version}, found {found}")

    metadata = bytes(metadata)
    if len(metadata) < _HEAD.size or metadata[:4] != _MAGIC:
        raise wrong(f"{len(metadata)} bytes that no engine of commplane-disagg made")
    _, name, its_version, checksum, nbytes = _HEAD.unpack_from(metadata)
    its_name = name.rstrip(b"\0").decode(errors="replace")
    if (its_name, its_version) != (engine, version):
        raise wrong(f"that of engine {its_name!r} version {its_version}: both ends must open the same one")
    data = metadata[_HEAD.size :]
    if len(data) != nbytes or zlib.crc32(data) != checksum:
        raise wrong(f"{len(data)} of {nbytes} bytes, or bytes that changed on the way: pass it on as it is")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise wrong(f"a body that does not fit: {error}") from error
