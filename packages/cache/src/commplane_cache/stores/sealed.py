"""A page with its checksum in front, as one value: what stores keep that have values, not slots."""

from __future__ import annotations

import xxhash

from commplane_cache.stores.batch import Part

__all__ = ["SEAL_BYTES", "is_whole", "seal"]

SEAL_BYTES = 8


def seal(part: Part, index: int) -> bytearray | None:
    """A private copy of a page that is to be stored, sealed; None if the batch is over.

    A copy, because the library may still read it when the batch is late and its pages are the caller's again.
    """
    if not part.enter():
        return None
    try:
        value = bytearray(SEAL_BYTES + part.pages[index].nbytes)
        memoryview(value)[SEAL_BYTES:] = part.pages[index]
    finally:
        part.leave()
    value[:SEAL_BYTES] = xxhash.xxh3_64_digest(memoryview(value)[SEAL_BYTES:])
    return value


def is_whole(value: memoryview, page_bytes: int) -> bool:
    """Whether it is a sealed page of that size, unharmed."""
    return value.nbytes == SEAL_BYTES + page_bytes and value[:SEAL_BYTES] == xxhash.xxh3_64_digest(value[SEAL_BYTES:])
