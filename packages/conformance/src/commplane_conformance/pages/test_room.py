"""What it says of its room, and what happens when there is none left."""

from __future__ import annotations

import pytest

from commplane.api import PageStore
from commplane_conformance.marks import clause, needs
from commplane_conformance.pages.book import exists, get, keys_of, put, remove
from commplane_conformance.pages.place import Place

pytestmark = pytest.mark.timeout(120)
_MOST = 512
"""Pages that a test is willing to fill a store with."""


def _room(store: PageStore) -> int:
    capacity = store.usage().capacity
    if capacity is None or capacity > _MOST:
        pytest.skip(f"room for {capacity or 'an unknown number of'} pages: give options that leave room for at most {_MOST}")
    return capacity


@clause("P14")
def test_usage_counts_pages(place: Place, store: PageStore) -> None:
    before = store.usage()
    if before.pages is None:
        pytest.skip("the number of its pages is not known without asking")
    keys = keys_of("usage", 9)
    put(store, keys, place.page_bytes)
    put(store, keys[:4], place.page_bytes)
    assert store.usage().pages == before.pages + 9
    remove(store, keys[:5])
    assert store.usage().pages == before.pages + 4
    assert store.usage().capacity == before.capacity
    assert before.capacity is None or before.capacity >= before.pages + 9


@clause("P14")
@needs("evicts")
def test_when_full_the_least_recently_used_go(place: Place, store: PageStore) -> None:
    room = _room(store)
    nbytes, keys = place.page_bytes, keys_of("full", room + room // 2)
    for key in keys[:room]:
        assert put(store, [key], nbytes).ok == (True,)
    assert all(exists(store, keys[:room]).ok)
    kept = keys[: room // 4]
    assert all(get(store, kept, nbytes).ok)  # used again, in this order
    for key in keys[room:]:
        assert put(store, [key], nbytes).ok == (True,)
    usage = store.usage()
    assert usage.pages is None or usage.pages <= room
    gone = room // 2
    assert all(get(store, kept, nbytes).ok), "pages that were used lately are gone"
    assert not any(get(store, keys[room // 4 : room // 4 + gone], nbytes).ok), "pages that were not used for longest are there"
    assert all(get(store, keys[room // 4 + gone :], nbytes).ok)


@clause("P14")
@needs("evicts")
def test_more_pages_than_there_is_room_for_come_and_go_without_harm(place: Place, store: PageStore) -> None:
    room = _room(store)
    nbytes = place.page_bytes
    for number in range(6):
        keys = keys_of(f"flood {number}", max(1, room // 3))
        assert all(put(store, keys, nbytes).ok)
        assert all(get(store, keys, nbytes).ok)
        assert all(remove(store, keys[::2]).ok)
    done = put(store, keys_of("flood", room * 2), nbytes)  # it may keep any of them
    found = get(store, keys_of("flood", room * 2), nbytes)
    assert any(found.ok)
    assert all(was for was, there in zip(done.ok, found.ok, strict=True) if there)
