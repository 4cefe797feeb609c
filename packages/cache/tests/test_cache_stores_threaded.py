"""The base of the stores: it makes nobody wait, and gives pages back in time whatever the library does."""

from __future__ import annotations

import importlib
import threading
from typing import ClassVar

import pytest

from commplane.api import StoreContext, StoreUsage
from commplane.errors import CommplaneError, CommplaneWarning, ConfigError
from commplane_cache.stores.options import read_options
from commplane_cache.stores.sealed import SEAL_BYTES, is_whole
from commplane_cache.stores.valued import ValuedStore

pytestmark = pytest.mark.timeout(60)
NBYTES = 16


class Slow(ValuedStore):
    """A dict behind a gate: nothing passes while it is shut."""

    name = "slow"
    defaults: ClassVar = {"size": 3}

    def do_open(self, context, options):
        self.gate, self.pages, self.shut = threading.Event(), {}, 0
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def pass_gate(self):
        self.entered.release()
        assert self.gate.wait(30)

    def values_there(self, names):
        self.pass_gate()
        return [name in self.pages for name in names]

    def values_read(self, names, take):
        self.pass_gate()
        for index, name in enumerate(names):
            if name in self.pages:
                take(index, memoryview(self.pages[name]))

    def values_write(self, names, values):
        self.pass_gate()
        for name, value in zip(names, values, strict=True):
            self.pages.setdefault(name, bytes(value))
        return [None] * len(names)

    def values_remove(self, names):
        if any(name.endswith(b"wrong") for name in names):
            raise ZeroDivisionError("the library's own")
        return [None if self.pages.pop(name, None) else "not so" for name in names]

    def usage(self):
        return StoreUsage(len(self.pages), None)

    def do_shut(self):
        self.shut += 1


def opened(timeout=20.0, threads=1):
    store = Slow()
    store.open(StoreContext(NBYTES, "n", timeout, {"threads": threads}))
    return store


def end(store, ticket):
    found = []
    while not found:
        found = store.poll(1.0)
    assert [done.ticket for done in found] == [ticket]
    return found[0]


def page(byte):
    return memoryview(bytearray([byte] * NBYTES))


def test_a_library_that_hangs_makes_nobody_wait():
    store = opened()
    store.gate.clear()
    tickets = [store.submit_put([b"k"], [page(1)]), store.submit_exists([b"k"]), store.submit_remove([b"k"])]
    assert store.poll() == []
    store.usage()
    store.gate.set()
    found = []
    while len(found) < 3:
        found += store.poll(1.0)
    assert [(done.ticket, done.ok) for done in found] == [(ticket, (True,)) for ticket in tickets]
    store.close()


def test_a_late_get_ends_with_an_error_and_never_touches_the_page_again():
    store = opened(timeout=0.2)
    assert end(store, store.submit_put([b"k"], [page(7)])).ok == (True,)
    store.gate.clear()
    mine = page(0)
    done = end(store, store.submit_get([b"k"], [mine]))
    assert done.ok == (False,)
    assert "get of 1 keys is not over after 0.2 s" in done.error
    store.gate.set()  # the library answers now
    again = page(0)
    store.timeout = 20.0
    assert end(store, store.submit_get([b"k"], [again])).ok == (True,)  # the same thread, so the late one is over
    assert again == page(7)
    assert mine == page(0)
    store.close()


def test_a_page_put_late_is_the_one_that_was_given_not_what_the_buffer_holds_by_then():
    store = opened(timeout=0.2)
    store.gate.clear()
    mine = page(1)
    done = end(store, store.submit_put([b"k"], [mine]))
    assert done.ok == (False,)
    mine[:] = page(2)  # the caller's again
    store.gate.set()
    store.timeout = 20.0
    read = page(0)
    assert end(store, store.submit_get([b"k"], [read])).ok == (True,)
    assert read == page(1)
    store.close()


def test_batches_behind_a_late_one_end_in_time_too():
    store = opened(timeout=0.2)
    store.gate.clear()
    tickets = [store.submit_exists([b"k"]) for _ in range(5)]
    found = []
    while len(found) < 5:
        found += store.poll(5.0)
    assert [done.ticket for done in found] == tickets
    assert all(done.ok == (False,) and done.error for done in found)
    store.gate.set()
    store.close()


def test_what_a_library_raises_ends_in_the_completion():
    store = opened()
    done = end(store, store.submit_remove([b"fine", b"wrong"]))
    assert done.ok == (False, False)
    assert done.error == "slow: remove of 2 keys failed: ZeroDivisionError: the library's own"
    done = end(store, store.submit_remove([b"fine"]))
    assert done.error == "slow: remove failed: not so"
    store.close()


def test_close_waits_for_what_is_out_and_shuts_once():
    store = opened(threads=3)
    store.gate.clear()
    tickets = [store.submit_put([b"%d" % number], [page(number)]) for number in range(6)]
    closing = threading.Thread(target=store.close)
    closing.start()
    assert store.entered.acquire(timeout=20)
    store.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    found = store.poll()
    assert sorted(done.ticket for done in found) == tickets
    assert all(done.ok == (True,) for done in found)
    assert store.shut == 1
    store.close()
    assert store.shut == 1


def test_close_does_not_wait_for_ever_for_a_library_that_hangs():
    store = opened(timeout=0.3)
    store.gate.clear()
    ticket = store.submit_exists([b"k"])
    with pytest.warns(CommplaneWarning, match="slow: 1 threads did not end within 0.3 s"):
        store.close()
    assert [(done.ticket, done.ok) for done in store.poll()] == [(ticket, (False,))]
    assert store.shut == 0  # not under a thread that is in the library
    store.gate.set()
    for thread in store._threads:
        thread.join(20)
    assert store.shut == 1


def test_a_store_opens_once():
    store = opened()
    with pytest.raises(ConfigError, match="found one that is open; make another one"):
        store.open(StoreContext(NBYTES, "n"))
    store.close()
    assert [t for t in threading.enumerate() if t.name.startswith("commplane-slow")] == []


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({}, (3, 0.5, False, "x")),
        ({"n": "8", "f": "2", "b": "yes", "s": "y"}, (8, 2.0, True, "y")),
        ({"n": 4, "f": 1}, (4, 1.0, False, "x")),
    ],
)
def test_options_take_the_type_of_their_default(given, read):
    assert tuple(read_options("s", given, {"n": 3, "f": 0.5, "b": False, "s": "x"}).values()) == read


@pytest.mark.parametrize("given", [{"n": "many"}, {"n": True}, {"b": "perhaps"}, {"s": 5}, {"m": 1}])
def test_options_that_do_not_fit_are_refused_by_name(given):
    with pytest.raises(ConfigError, match=f"s: wanted option.*{next(iter(given))}"):
        read_options("s", given, {"n": 3, "b": False, "s": "x"})


def test_a_sealed_page_is_whole_only_as_it_was_sealed():
    store = opened()
    assert end(store, store.submit_put([b"k"], [page(9)])).ok == (True,)
    (name, value), *_ = store.pages.items()
    assert is_whole(memoryview(value), NBYTES)
    for at in range(len(value)):
        bent = bytearray(value)
        bent[at] ^= 0x40
        assert not is_whole(memoryview(bent), NBYTES)
    assert not is_whole(memoryview(value)[:-1], NBYTES)
    assert not is_whole(memoryview(b""), NBYTES)
    store.pages[name] = bytes(len(value))
    done = end(store, store.submit_get([b"k"], [page(0)]))
    assert (done.ok, done.error) == ((False,), "slow: 1 pages are damaged; they are forgotten")
    assert store.pages == {}
    assert len(value) == SEAL_BYTES + NBYTES
    store.close()


@pytest.mark.parametrize(
    "store", ["lmdb:LmdbStore", "redis:RedisStore", "fsspec:FsspecStore", "mooncake:MooncakeStore", "slab:SlabStore"]
)
def test_a_store_without_its_address_says_which_option_is_missing(store):
    module, name = store.split(":")
    made = getattr(importlib.import_module(f"commplane_cache.stores.{module}"), name)()
    with pytest.raises(CommplaneError, match=r"set the option (path|url|master)"):
        made.open(StoreContext(NBYTES, "n"))
