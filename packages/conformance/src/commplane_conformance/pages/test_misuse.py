"""What does not fit is said in the completion, for the key that it is true of."""

from __future__ import annotations

import pytest

from commplane.api import PageStore, StoreContext
from commplane.errors import CommplaneError
from commplane_conformance.marks import clause
from commplane_conformance.pages.book import blank, end, ends, exists, get, keys_of, page_of, put
from commplane_conformance.pages.place import Place

pytestmark = pytest.mark.timeout(60)


@clause("P5", "P8")
@pytest.mark.parametrize("wrong", [b"", b"x" * 65])
def test_a_key_that_does_not_fit_is_refused_and_the_others_are_served(place: Place, store: PageStore, wrong: bytes) -> None:
    nbytes, keys = place.page_bytes, keys_of("fits", 2)
    mixed = [keys[0], wrong, keys[1]]
    done = end(store, store.submit_put(mixed, [page_of(b"k", nbytes), page_of(b"k", nbytes), page_of(b"k", nbytes)]))
    assert done.ok == (True, False, True)
    assert done.error
    for again in (exists(store, mixed), end(store, store.submit_get(mixed, blank(3, nbytes)))):
        assert again.ok == (True, False, True)
        assert again.error


@clause("P5", "P8")
def test_a_page_of_another_size_is_refused_and_the_others_are_served(place: Place, store: PageStore) -> None:
    nbytes, keys = place.page_bytes, keys_of("size", 4)
    pages = [page_of(keys[0], nbytes), page_of(keys[1], nbytes - 1), page_of(keys[2], nbytes + 1), page_of(keys[3], nbytes)]
    done = end(store, store.submit_put(keys, pages))
    assert done.ok == (True, False, False, True)
    assert done.error
    assert get(store, keys, nbytes).ok == (True, False, False, True)
    short = blank(4, nbytes)
    short[0] = short[0][:-1]
    done = end(store, store.submit_get(keys, short))
    assert done.ok == (False, False, False, True)
    assert done.error
    assert short[3] == page_of(keys[3], nbytes)


@clause("P8")
def test_reading_into_what_cannot_be_written_is_refused(place: Place, store: PageStore) -> None:
    keys = keys_of("read only", 2)
    put(store, keys, place.page_bytes)
    done = end(store, store.submit_get(keys, [memoryview(bytes(place.page_bytes)), *blank(1, place.page_bytes)]))
    assert done.ok == (False, True)
    assert done.error


@clause("P8")
def test_more_keys_than_pages_are_refused(place: Place, store: PageStore) -> None:
    keys = keys_of("count", 3)
    tickets = [store.submit_put(keys, blank(2, place.page_bytes)), store.submit_get(keys, blank(4, place.page_bytes))]
    assert all(done.ok == (False,) * 3 and done.error for done in ends(store, tickets).values())
    assert not any(exists(store, keys).ok)


@clause("P7")
def test_a_batch_without_keys_ends_too(store: PageStore) -> None:
    tickets = [store.submit_exists([]), store.submit_get([], []), store.submit_put([], []), store.submit_remove([])]
    assert all(done.ok == () and done.error is None for done in ends(store, tickets).values())


@clause("P8")
def test_after_close_a_submission_ends_at_once_refused(place: Place, store: PageStore) -> None:
    nbytes, keys = place.page_bytes, keys_of("closed", 3)
    put(store, keys, nbytes)
    store.close()
    pages = blank(3, nbytes)
    tickets = [
        store.submit_exists(keys),
        store.submit_get(keys, pages),
        store.submit_put(keys, pages),
        store.submit_remove(keys),
    ]
    found = {done.ticket: done for done in store.poll()}
    assert set(found) == set(tickets)
    assert all(done.ok == (False,) * 3 and done.error for done in found.values())
    assert pages == blank(3, nbytes)
    store.close()
    store.usage()


@clause("P16")
def test_open_refuses_what_it_does_not_understand(place: Place) -> None:
    with pytest.raises(CommplaneError, match="no_such_option"):
        place.subject.make().open(place.context(no_such_option=1))
    context = place.context()
    with pytest.raises(CommplaneError):
        place.subject.make().open(StoreContext(0, context.namespace, context.timeout, context.options))
