"""The spoilt store and the journal, over a store that answers at once."""

from __future__ import annotations

import json
import time
import zlib

import pytest

from commplane.api import PageStore, StoreContext, StoreDone, StoreUsage
from commplane.errors import ConfigError
from commplane_cache.demo.faults import FaultyStore, Journal, parse_fault

PAGE = 64


class Plain(PageStore):
    """A dictionary."""

    def open(self, context):
        self.pages, self.done, self.tickets = {}, [], 0

    def end(self, ok):
        self.tickets += 1
        self.done.append(StoreDone(self.tickets, tuple(ok)))
        return self.tickets

    def submit_exists(self, keys):
        return self.end(k in self.pages for k in keys)

    def submit_get(self, keys, pages):
        for key, page in zip(keys, pages, strict=True):
            if key in self.pages:
                page[:] = self.pages[key]
        return self.end(k in self.pages for k in keys)

    def submit_put(self, keys, pages):
        self.pages.update(zip(keys, map(bytes, pages), strict=True))
        return self.end(True for _ in keys)

    def submit_remove(self, keys):
        return self.end(self.pages.pop(k, True) is not None for k in keys)

    def poll(self, timeout=0.0):
        done, self.done = self.done, []
        return done

    def usage(self):
        return StoreUsage(len(self.pages), None)

    def close(self):
        pass


def opened(store):
    store.open(StoreContext(PAGE, "test"))
    return store


def page(fill):
    return memoryview(bytearray([fill]) * PAGE)


def ends(store, n, seconds=5.0):
    out, deadline = {}, time.monotonic() + seconds
    while len(out) < n and time.monotonic() < deadline:
        out.update((d.ticket, d) for d in store.poll(0.05))
    return out


def test_a_slow_store_tells_the_same_ends_later():
    store = opened(FaultyStore(Plain(), "slow", delay=0.2))
    start = time.monotonic()
    put, there = store.submit_put([b"a"], [page(1)]), store.submit_exists([b"a", b"b"])
    assert store.poll() == []
    found = ends(store, 2)
    assert time.monotonic() - start >= 0.2
    assert found[put].ok == (True,) and found[there].ok == (True, False)


def test_a_failing_store_loses_a_portion_of_the_pages_and_says_so():
    store = opened(FaultyStore(Plain(), "failing", portion=0.5, seed=1))
    keys = [bytes([i]) for i in range(100)]
    put = store.submit_put(keys, [page(1)] * 100)
    done = ends(store, 1)[put]
    assert 20 < sum(done.ok) < 80 and "failed" in str(done.error)


def test_a_store_that_is_gone_ends_every_later_batch_with_an_error():
    store = opened(FaultyStore(Plain(), "gone", after=1))
    put = store.submit_put([b"a"], [page(1)])
    lost = [store.submit_exists([b"a", b"b"]), store.submit_get([b"a"], [page(0)]), store.submit_put([b"c"], [page(1)])]
    found = ends(store, 4)
    assert found[put].ok == (True,)
    assert [found[t].ok for t in lost] == [(False, False), (False,), (False,)]
    assert all("gone" in str(found[t].error) for t in lost)


def test_the_journal_has_each_page_by_the_time_its_end_is_told(tmp_path):
    journal = tmp_path / "journal"
    store = opened(Journal(Plain(), journal))
    into = page(0)
    store.submit_put([b"a"], [page(7)])
    ends(store, 1)
    store.submit_get([b"a", b"b"], [into, page(0)])
    ends(store, 1)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    crc = zlib.crc32(page(7))
    assert lines == [{"put": b"a".hex(), "crc": crc}, {"get": b"a".hex(), "crc": crc}]
    assert into == page(7)
    store.close()
    store.close()


def test_a_fault_that_cannot_be_is_refused():
    assert parse_fault("slow@3", 4) == ("slow", 3)
    for text in ("slow", "broken@1", "slow@4", "slow@x", "gone@-1"):
        with pytest.raises(ConfigError, match="wanted KIND@RANK"):
            parse_fault(text, 4)
