"""Pages that tell which key they belong to, and what is done with a store and its tickets."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from commplane.api import PageStore, StoreDone

__all__ = ["PATIENCE", "blank", "end", "ends", "exists", "get", "keys_of", "page_of", "put", "remove"]

PATIENCE = 60.0
"""Seconds after which a test gives up on a ticket; longer than the timeout that stores are opened with."""


def keys_of(seed: str, count: int, nbytes: int = 32) -> list[bytes]:
    """That many different keys."""
    return [hashlib.shake_128(f"{seed} {index}".encode()).digest(nbytes) for index in range(count)]


def page_of(key: bytes, nbytes: int) -> memoryview:
    """The page of a key: bytes that no other key's page has."""
    return memoryview(bytearray(hashlib.shake_128(b"page of " + key).digest(nbytes)))


def blank(count: int, nbytes: int) -> list[memoryview]:
    """Buffers for reading; none of them is what a page looks like."""
    return [memoryview(bytearray(b"\xa5" * nbytes)) for _ in range(count)]


def ends(store: PageStore, tickets: Sequence[int]) -> dict[int, StoreDone]:
    """Poll until all have ended, and say how. No other ticket may end."""
    found: dict[int, StoreDone] = {}
    limit = time.monotonic() + PATIENCE
    while len(found) < len(tickets):
        assert time.monotonic() < limit, f"tickets {sorted(set(tickets) - set(found))} have no end after {PATIENCE:.0f} s"
        for done in store.poll(1.0):
            assert done.ticket in tickets, f"ticket {done.ticket} was not given out, or ended before"
            assert done.ticket not in found, f"ticket {done.ticket} ended twice"
            found[done.ticket] = done
    return found


def end(store: PageStore, ticket: int) -> StoreDone:
    """The end of the one batch that is out."""
    return ends(store, [ticket])[ticket]


def put(store: PageStore, keys: Sequence[bytes], nbytes: int) -> StoreDone:
    """Store the pages of these keys."""
    return end(store, store.submit_put(keys, [page_of(key, nbytes) for key in keys]))


def get(store: PageStore, keys: Sequence[bytes], nbytes: int) -> StoreDone:
    """Read these keys; every page that is said to be read must be the right one."""
    pages = blank(len(keys), nbytes)
    done = end(store, store.submit_get(keys, pages))
    assert len(done.ok) == len(keys)
    for key, page, ok in zip(keys, pages, done.ok, strict=True):
        assert not ok or page == page_of(key, nbytes), f"the page of key {key.hex()} was read with other bytes than were put"
    return done


def exists(store: PageStore, keys: Sequence[bytes]) -> StoreDone:
    """Ask for these keys."""
    return end(store, store.submit_exists(keys))


def remove(store: PageStore, keys: Sequence[bytes]) -> StoreDone:
    """Forget these keys."""
    return end(store, store.submit_remove(keys))
