"""Pages of another namespace are never found."""

from __future__ import annotations

import pytest

from commplane_conformance.marks import clause, needs
from commplane_conformance.pages.book import exists, get, keys_of, put, remove
from commplane_conformance.pages.place import Place

pytestmark = pytest.mark.timeout(60)


@clause("P9")
@needs("durable")
def test_namespaces_do_not_see_each_other(place: Place) -> None:
    nbytes, keys = place.page_bytes, keys_of("same keys", 6)
    one, two = f"{place.namespace} one", f"{place.namespace} two"
    store = place.open(one)
    assert all(put(store, keys, nbytes).ok)
    store.close()
    store = place.open(two)
    assert not any(exists(store, keys).ok)
    assert not any(get(store, keys, nbytes).ok)
    assert all(put(store, keys[:3], nbytes).ok)
    assert all(remove(store, keys).ok)
    store.close()
    store = place.open(one)
    assert all(get(store, keys, nbytes).ok), "another namespace took pages away"
    store.close()


@clause("P9", "P13")
@needs("shared")
def test_namespaces_that_are_open_together_do_not_see_each_other(place: Place) -> None:
    nbytes, keys = place.page_bytes, keys_of("same keys", 6)
    child = place.writer("same keys", 6, 6, nbytes)  # in the namespace of the place
    try:
        assert child.stdout is not None
        store = place.open(f"{place.namespace} other")
        while child.stdout.readline().strip() not in ("6", ""):
            pass
        assert not any(exists(store, keys).ok)
        assert not any(get(store, keys, nbytes).ok)
    finally:
        child.communicate(timeout=place.timeout)  # it closes its store
