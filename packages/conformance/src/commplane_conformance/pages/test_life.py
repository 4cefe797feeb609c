"""What a store leaves behind: nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from commplane_conformance.marks import clause
from commplane_conformance.pages.book import ends, get, keys_of, page_of, put
from commplane_conformance.pages.place import Place

pytestmark = pytest.mark.timeout(120)


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
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    return len(list((own / "fd").iterdir())), len(tasks), children


@clause("P15")
def test_a_closed_store_leaves_no_descriptor_thread_or_process_behind(place: Place) -> None:
    held = []
    for number in range(4):
        store = place.open()
        keys = keys_of(f"leak {number}", 4)
        assert all(put(store, keys, place.page_bytes).ok)
        assert all(get(store, keys, place.page_bytes).ok)
        store.close()
        del store
        place.opened.clear()
        held.append(_held())
    # The first time a library may start what it keeps for the whole process.
    assert held[1] == held[2] == held[3], f"descriptors, threads and processes after each of four lives: {held}"
