"""The cache on one rank, end to end, through memory that can be looked at."""

from __future__ import annotations

import numpy as np
import pytest

from commplane.testing import SimulatedRounds
from commplane_cache.agreed import cache_sync_spec
from commplane_cache.cache import PrefixCache
from commplane_cache.options import CacheOptions
from commplane_cache.testing import SeededStore
from commplane_cache.tiers import FlatCopier, HostTier
from commplane_cache.tree import TokenRun

PAGE = 64
pytestmark = pytest.mark.timeout(30)


class OneRank:
    def __init__(self, device=8, host=16, store=None, **options):
        self.device = np.zeros((device, PAGE), np.uint8)
        self.host = np.zeros((host, PAGE), np.uint8)
        self.cache = PrefixCache(
            SimulatedRounds(1, [cache_sync_spec()])[0],
            device,
            HostTier(self.host, PAGE),
            store,
            copier=FlatCopier(self.device, self.host, PAGE),
            options=CacheOptions(page_tokens=4, **options),
        )
        self.settle()

    def settle(self):
        self.cache.step()
        for _ in range(100):
            if not self.cache.busy:
                self.cache.check()
                return
            self.cache.step()
        raise AssertionError("the cache is busy after 100 steps")

    def serve(self, tokens):
        """Serve a prompt as an engine would: pages computed; every page's bytes are made from its key and looked at."""
        cache, run = self.cache, TokenRun(tokens, 4)
        if cache.prefetch("request", run, cache.match(run)):
            while not cache.check_prefetch_progress("request"):
                cache.step()
        known = cache.match(run, again=True)
        work = cache.load_back(known)
        while work is not None and work.agreed is None:
            cache.step()
        known = cache.match(run, again=True)
        cache.lock(known.device_node)
        for page, key in zip(known.pages, run.keys(0, known.device), strict=True):
            assert bytes(self.device[page]) == key * 2, "a page of the cache has other bytes than were computed"
        own = cache.allocate(run.pages - known.device)
        while own is None:
            cache.step()
            own = cache.allocate(run.pages - known.device)
        for page, key in zip(own, run.keys(known.device, run.pages), strict=True):
            self.device[page] = np.frombuffer(key * 2, np.uint8)
        done = cache.insert(run, own, start=known.device)
        cache.lock(done.node)
        cache.unlock(known.device_node)
        cache.unlock(done.node)
        return len(own)


def test_what_was_computed_once_is_not_computed_again():
    rank = OneRank()
    assert rank.serve(list(range(20))) == 5
    assert rank.serve([*range(12), *range(50, 62)]) == 3
    assert rank.serve(list(range(20))) == 0


def test_a_new_process_finds_its_pages_in_storage():
    store = SeededStore(delay=2)
    first = OneRank(store=store)
    assert first.serve(list(range(20))) == 5
    first.settle()
    second = OneRank(store=store, prefetch="wait_complete")
    assert second.serve(list(range(20))) == 0
    assert second.cache.counters.storage.moved == 5


@pytest.mark.parametrize("write", ["write_through", "write_through_selective", "write_back"])
def test_what_leaves_the_device_comes_back_from_the_host(write):
    rank = OneRank(device=6, host=30, write=write)
    for _ in range(2):
        rank.serve(list(range(20)))
        rank.serve(list(range(20)))  # used twice: that is what the selective policy waits for
        rank.settle()
        rank.serve(list(range(100, 124)))  # fills the device
        rank.settle()
    assert rank.cache.counters.host.moved >= 5
    assert rank.serve(list(range(20))) == 0
