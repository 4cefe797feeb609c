"""Frames on a byte stream: four bytes of length, big-endian, then that many bytes."""

from __future__ import annotations

import struct

from commplane.errors import CommplaneError

__all__ = ["FrameReader", "frame"]

_LENGTH = struct.Struct(">I")


def frame(body: bytes) -> bytes:
    """A body with its length before it."""
    return _LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a stream into bodies, however its bytes come in.

    Attributes:
        limit: the longest body that is taken, in bytes; may be raised once a peer is trusted.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are whole after `data`.

        Raises:
            CommplaneError: a body is longer than the limit; the stream cannot be read on.
        """
        buffer = self._buffer
        buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > self.limit:
                raise CommplaneError(f"a frame of {length} bytes is longer than the limit of {self.limit}")
            end = start + _LENGTH.size + length
            if end > len(buffer):
                break
            bodies.append(bytes(buffer[start + _LENGTH.size : end]))
            start = end
        del buffer[:start]
        return bodies
