"""All pages in the order of use, copied in pieces: whoever asks for a page meanwhile waits for a piece, not for all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from commplane_cache.stores.slab.slots import Slots

__all__ = ["in_order"]

_SLOTS_AT_ONCE = 32768


def in_order(slots: Slots, lock: threading.Lock) -> Iterator[tuple[bytes, int, int]]:
    """Name, slot and checksum, least recently used first. `lock`, which guards `slots`, is taken for each piece.

    The caller sees to it that no page is committed until this has ended, so each is found at most once. One that is dropped
    meanwhile may be among them.
    """
    pieces = []
    names: list[bytes | None] = []
    while True:
        with lock:
            piece = slots.piece(len(names), _SLOTS_AT_ONCE)
        if not piece.names:
            break
        names += piece.names
        pieces.append(piece)
    if not pieces:
        return
    sums = np.concatenate([np.frombuffer(piece.sums, np.uint64) for piece in pieces])
    # By numpy, because Python's own sort stops all threads until it is done.
    order = np.argsort(np.concatenate([np.frombuffer(piece.used, np.uint64) for piece in pieces]))
    for slot in map(int, order):
        name = names[slot]
        if name is not None:
            yield name, slot, int(sums[slot])
