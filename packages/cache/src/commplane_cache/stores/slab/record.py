"""What the log of a slab is made of: a header, then records of one size, each with a checksum of its own.

A record is about a slot, never about a key alone: "slot 5 now holds this key, whose page has this checksum", or "slot 5 is free".
The owner of a slot writes its records in order, so the order between slots does not matter, and several threads may append.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["HEADER_BYTES", "RECORD_BYTES", "Header", "Record", "free_record", "put_record", "records"]

_MAGIC = b"commplane slab 1"
_HEADER = struct.Struct("<16sQ36xI")  # magic, page bytes, reserved, crc32 of what is before
HEADER_BYTES = _HEADER.size
_NAME_BYTES = 82
_BODY = struct.Struct(f"<BBxxxxQQ{_NAME_BYTES}s")  # kind, length of name, slot, checksum of the page, name
RECORD_BYTES = _BODY.size + 4  # and the crc32 of the body
_PUT, _FREE = 1, 2


@dataclass(frozen=True)
class Header:
    """What a slab was made for."""

    page_bytes: int

    def pack(self) -> bytes:
        """`HEADER_BYTES` bytes."""
        body = _HEADER.pack(_MAGIC, self.page_bytes, 0)[:-4]
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Header | None:
        """None if it is not one, or damaged."""
        if len(data) != HEADER_BYTES:
            return None
        magic, page_bytes, crc = _HEADER.unpack(data)
        if magic != _MAGIC or crc != zlib.crc32(data[:-4]):
            return None
        return cls(page_bytes)


@dataclass(frozen=True)
class Record:
    """`name` is empty where the slot is free."""

    slot: int
    name: bytes
    checksum: int


def _pack(kind: int, slot: int, name: bytes, checksum: int) -> bytes:
    body = _BODY.pack(kind, len(name), slot, checksum, name)
    return body + zlib.crc32(body).to_bytes(4, "little")


def put_record(slot: int, name: bytes, checksum: int) -> bytes:
    """The slot holds the page of that name (at most 82 bytes)."""
    assert len(name) <= _NAME_BYTES
    return _pack(_PUT, slot, name, checksum)


def free_record(slot: int) -> bytes:
    """The slot holds nothing."""
    return _pack(_FREE, slot, b"", 0)


def records(data: bytes) -> Iterator[Record | None]:
    """All of them in order; None for one that is damaged. A last one that is not whole is left out."""
    view = memoryview(data)
    for start in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        body = view[start : start + _BODY.size]
        if zlib.crc32(body) != int.from_bytes(view[start + _BODY.size : start + RECORD_BYTES], "little"):
            yield None
            continue
        kind, length, slot, checksum, name = _BODY.unpack(body)
        yield Record(slot, name[:length] if kind == _PUT else b"", checksum)
