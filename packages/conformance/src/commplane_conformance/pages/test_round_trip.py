"""What is put is read back."""

from __future__ import annotations

import pytest

from commplane.api import PageStore
from commplane_conformance.marks import clause
from commplane_conformance.pages.book import blank, end, ends, exists, get, keys_of, page_of, put, remove
from commplane_conformance.pages.place import Place

pytestmark = pytest.mark.timeout(120)


@clause("P1", "P6")
@pytest.mark.parametrize("nbytes", [1, 3, 512, 4095, 4096, 65536, 262147])
def test_pages_of_any_size_come_back_byte_for_byte(place: Place, nbytes: int) -> None:
    store = place.open(page_bytes=nbytes, namespace=f"{place.namespace} {nbytes}")
    keys = keys_of("size", 9)
    done = put(store, keys, nbytes)
    assert done.ok == (True,) * 9, done.error
    assert get(store, keys, nbytes).ok == (True,) * 9
    assert get(store, keys[::-1], nbytes).ok == (True,) * 9


@clause("P1")
def test_many_keys_in_batches_of_many_sizes(place: Place, store: PageStore) -> None:
    nbytes, keys, start = place.page_bytes, keys_of("many", 400), 0
    for size in (1, 2, 7, 90, 300):
        assert all(put(store, keys[start : start + size], nbytes).ok)
        start += size
    assert all(exists(store, keys).ok)
    done = get(store, keys, nbytes)
    assert all(done.ok)
    assert done.error is None


@clause("P1")
def test_keys_of_1_to_64_bytes_with_any_bytes_in_them(place: Place, store: PageStore) -> None:
    keys = (
        [bytes([255] * n) for n in range(1, 65)]
        + [bytes(n) for n in range(1, 65)]
        + [b"a/b", b"../x", b"a b", b"\n", b"%2f", b"."]
    )
    assert all(put(store, keys, place.page_bytes).ok)
    assert all(exists(store, keys).ok)
    assert all(get(store, keys, place.page_bytes).ok)
    assert all(remove(store, keys[:100]).ok)
    assert exists(store, keys).ok == (False,) * 100 + (True,) * (len(keys) - 100)


@clause("P2")
def test_what_was_never_put_is_not_there_and_is_no_error(place: Place, store: PageStore) -> None:
    keys = keys_of("missing", 5)
    put(store, keys[1:4:2], place.page_bytes)
    there = (False, True, False, True, False)
    for done in (exists(store, keys), get(store, keys, place.page_bytes)):
        assert done.ok == there
        assert done.error is None


@clause("P3")
def test_a_key_put_again_counts_as_stored(place: Place, store: PageStore) -> None:
    keys = keys_of("again", 6)
    for _ in range(3):
        done = put(store, keys, place.page_bytes)
        assert done.ok == (True,) * 6
        assert done.error is None
    assert all(get(store, keys, place.page_bytes).ok)


@clause("P3")
def test_a_key_twice_in_a_batch_is_answered_twice(place: Place, store: PageStore) -> None:
    one, two, other = keys_of("twice", 3)
    keys = [one, two, one, one, other, two]
    assert put(store, keys[:-2], place.page_bytes).ok == (True,) * 4
    assert exists(store, keys).ok == (True, True, True, True, False, True)
    assert get(store, keys, place.page_bytes).ok == (True, True, True, True, False, True)
    assert remove(store, [one, one]).ok == (True, True)
    assert exists(store, [one, two]).ok == (False, True)


@clause("P4")
def test_what_is_removed_is_gone_and_may_be_put_again(place: Place, store: PageStore) -> None:
    keys = keys_of("removed", 10)
    put(store, keys, place.page_bytes)
    done = remove(store, [*keys[:5], *keys_of("never", 2)])
    assert done.ok == (True,) * 7  # what is not there is gone
    assert done.error is None
    for found in (exists(store, keys), get(store, keys, place.page_bytes)):
        assert found.ok == (False,) * 5 + (True,) * 5
        assert found.error is None
    assert all(put(store, keys, place.page_bytes).ok)
    assert all(get(store, keys, place.page_bytes).ok)


@clause("P6")
def test_put_leaves_the_pages_as_they_are(place: Place, store: PageStore) -> None:
    keys = keys_of("untouched", 8)
    pages = [page_of(key, place.page_bytes) for key in keys]
    assert all(end(store, store.submit_put(keys, [page.toreadonly() for page in pages])).ok)
    assert pages == [page_of(key, place.page_bytes) for key in keys]


@clause("P6")
def test_get_writes_into_its_buffers_and_nothing_beside_them(place: Place, store: PageStore) -> None:
    nbytes, keys = place.page_bytes, keys_of("beside", 8)
    put(store, keys, nbytes)
    room = memoryview(bytearray(b"\x5a" * (len(keys) * (nbytes + 64) + 7)))
    starts = [7 + index * (nbytes + 64) for index in range(len(keys))]
    assert all(end(store, store.submit_get(keys, [room[at : at + nbytes] for at in starts])).ok)
    assert bytes(room[:7]) == b"\x5a" * 7
    for key, at in zip(keys, starts, strict=True):
        assert room[at : at + nbytes] == page_of(key, nbytes)
        assert bytes(room[at + nbytes : at + nbytes + 64]) == b"\x5a" * 64


@clause("P7")
def test_batches_that_are_out_together_all_end_each_once(place: Place, store: PageStore) -> None:
    nbytes, keys = place.page_bytes, keys_of("together", 60)
    first = [store.submit_put(keys[at : at + 6], [page_of(key, nbytes) for key in keys[at : at + 6]]) for at in range(0, 60, 6)]
    assert len(set(first)) == len(first)
    assert all(all(done.ok) for done in ends(store, first).values())
    buffers = [blank(6, nbytes) for _ in range(10)]
    reads = {store.submit_get(keys[at : at + 6], buffers[at // 6]): at for at in range(0, 60, 6)}
    asks = [
        store.submit_exists(keys),
        store.submit_exists(keys[:1]),
        store.submit_put(keys[:3], [page_of(k, nbytes) for k in keys[:3]]),
    ]
    found = ends(store, [*reads, *asks])
    assert not {*reads, *asks} & set(first), "a ticket was given out twice"
    for ticket, at in reads.items():
        assert found[ticket].ok == (True,) * 6
        assert buffers[at // 6] == [page_of(key, nbytes) for key in keys[at : at + 6]]
    assert all(all(found[ticket].ok) for ticket in asks)
    assert store.poll() == []
    assert store.poll(0.05) == []


@clause("P3", "P7")
def test_the_same_pages_put_by_batches_that_are_out_together(place: Place, store: PageStore) -> None:
    nbytes, keys = place.page_bytes, keys_of("race", 20)
    tickets = [store.submit_put(keys, [page_of(key, nbytes) for key in keys]) for _ in range(6)]
    assert all(all(done.ok) for done in ends(store, tickets).values())
    assert all(get(store, keys, nbytes).ok)
    assert all(remove(store, keys).ok)
    assert not any(exists(store, keys).ok)
