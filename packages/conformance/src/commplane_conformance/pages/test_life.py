"""What a store leaves behind: nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from commplane_conformance.marks import clause
from commplane_conformance.pages.book import ends, get, keys_of, page_of, put
from commplane_conformance.pages.place import Place

pytestmark = pytest.mark.timeout(120)
SETTLE = 10.0
"""Seconds that what was held may take to go."""


@clause("P15")
def test_close_ends_what_was_submitted(place: Place) -> None:
    nbytes, keys = place.page_bytes, keys_of("close", 64)
    store = place.open()
    tickets = [store.submit_put(keys[at : at + 8], [page_of(key, nbytes) for key in keys[at : at + 8]]) for at in range(0, 64, 8)]
    store.close()
    found = ends(store, tickets)
    assert all(all(done.ok) for done in found.values()), [done.error for done in found.values()]
    store.close()
    if "durable" in place.subject.capabilities:
        assert all(get(place.open(), keys, nbytes).ok)


def _held() -> tuple[int, int, int]:
    """Descriptors, threads and children of this process."""
    own = Path("/proc/self")
    tasks = list((own / "task").iterdir())
    children = 0
    for task in tasks:
        try:
            children += len((task / "children").read_text().split())
        except OSError:  # this thread has just ended
            continue
    return len(list((own / "fd").iterdir())), len(tasks), children


def _is_more(held: tuple[int, int, int], than: tuple[int, int, int]) -> bool:
    return any(now > before for now, before in zip(held, than, strict=True))


def _held_once_settled(most: tuple[int, int, int]) -> tuple[int, int, int]:
    """What is held when it is no more than that, or after some seconds: a thread that was joined is still there for a moment."""
    limit = time.monotonic() + SETTLE
    while _is_more(held := _held(), most) and time.monotonic() < limit:
        time.sleep(0.01)
    return held


@clause("P15")
def test_a_closed_store_leaves_no_descriptor_thread_or_process_behind(place: Place) -> None:
    held: list[tuple[int, int, int]] = []
    for number in range(4):
        store = place.open()
        keys = keys_of(f"leak {number}", 4)
        assert all(put(store, keys, place.page_bytes).ok)
        assert all(get(store, keys, place.page_bytes).ok)
        store.close()
        del store
        place.opened.clear()
        # The first time a library may start what it keeps for the whole process.
        held.append(_held() if not held else _held_once_settled(held[0]))
    assert not any(_is_more(later, held[0]) for later in held), (
        f"descriptors, threads and processes after each of four lives: {held}"
    )
