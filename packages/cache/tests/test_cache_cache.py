"""The cache on one rank, end to end, through memory that can be looked at."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest

from commplane.api import StoreDone, SyncField
from commplane.errors import CommplaneError, ConfigError
from commplane.testing import SimulatedRounds
from commplane_cache.agreed import cache_sync_spec
from commplane_cache.cache import PrefixCache
from commplane_cache.metrics import CacheCollector
from commplane_cache.options import CacheOptions
from commplane_cache.plugin import commplane_register_cache_sync
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


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("prefetch", ["best_effort", "wait_complete", "timeout"])
def test_every_prompt_is_served_from_the_right_bytes_under_pressure(pipelined, prefetch):
    store = SeededStore(5, delay=2, lose=0.1)
    rank = OneRank(device=12, host=14, store=store, prefetch=prefetch, pipelined=pipelined, write="write_back", timeout_base=0.0)
    draw = np.random.default_rng(3)
    for _ in range(60):
        start = int(draw.integers(0, 6)) * 100
        rank.serve(
            [*range(start, start + 4 * int(draw.integers(1, 6))), *draw.integers(0, 9, int(draw.integers(0, 12))).tolist()]
        )
    rank.settle()
    counters = rank.cache.counters
    assert counters.device.hits > 0
    assert counters.host.moved > 0
    assert counters.storage.filled > 0


def test_rounds_by_halves_are_refused_out_of_order():
    rank = OneRank()
    with pytest.raises(CommplaneError, match="no round is out"):
        rank.cache.result()
    rank.cache.issue()
    with pytest.raises(CommplaneError, match="a round is out already"):
        rank.cache.issue()
    rank.cache.result()


def test_what_cannot_work_is_refused_when_the_cache_is_made():
    rounds = SimulatedRounds(1, [cache_sync_spec()])[0]
    host = HostTier(bytearray(128), 64)
    with pytest.raises(ConfigError, match="wants a copier"):
        PrefixCache(rounds, 4, host)
    with pytest.raises(ConfigError, match="storage wants a host tier"):
        PrefixCache(rounds, 4, store=SeededStore())
    for wrong in ({"evict": "random"}, {"write": "never"}, {"prefetch": "always"}, {"page_tokens": 0}, {"prefetch_slots": 1}):
        with pytest.raises(ConfigError, match="wanted"):
            CacheOptions(**wrong)
    for memory in (bytearray(100), bytes(128), np.zeros((8, 16), np.uint8)[:, ::2]):
        with pytest.raises(ConfigError, match="wanted"):
            HostTier(memory, 64)


def test_runs_of_other_pages_and_stale_matches_are_refused():
    rank = OneRank(device=5, host=5)
    cache = rank.cache
    with pytest.raises(ConfigError, match="4 tokens a page, found 3"):
        cache.match(TokenRun(range(9), 3))
    with pytest.raises(ConfigError, match="at most as many as the run has"):
        cache.insert(TokenRun(range(9), 4), np.arange(3))
    with pytest.raises(CommplaneError, match="2 pages before its own in the tree and 0 are there"):
        cache.insert(TokenRun(range(16), 4), cache.allocate(1), start=2)
    rank = OneRank(device=5, host=5)
    rank.serve(range(20))
    stale = rank.cache.match(TokenRun(range(20), 4))
    rank.settle()
    rank.serve(range(100, 120))
    rank.settle()
    rank.serve(range(200, 220))
    assert stale.node.parent is None
    with pytest.raises(CommplaneError, match="evicted before it was locked"):
        rank.cache.lock(stale.node)
    with pytest.raises(CommplaneError, match="match again"):
        rank.cache.prefetch("late", TokenRun(range(40), 4), stale)


class Raising(SeededStore):
    """A store that breaks its contract."""

    def submit_put(self, keys, pages):
        raise OSError("disk on fire")

    def submit_exists(self, keys):
        raise OSError("disk on fire")


def test_a_store_that_raises_is_a_store_that_failed():
    rank = OneRank(store=Raising(), prefetch="wait_complete")
    assert rank.serve(range(20)) == 5
    rank.settle()
    assert rank.cache.counters.storage.failed == 5
    assert rank.cache.storage_error == "OSError: disk on fire"
    assert rank.serve([*range(20), *range(40, 48)]) == 2


def test_closing_waits_for_storage_and_says_when_it_does_not_end():
    store = SeededStore(delay=1)
    rank = OneRank(store=store)
    rank.serve(range(20))
    rank.cache.step()
    rank.cache.close()
    rank.serve(range(50, 70))
    rank.cache.step()
    store.poll = lambda timeout=0.0: []
    with pytest.raises(CommplaneError, match=r"1 batches of storage have not ended within 0\.02 s"):
        rank.cache.close(timeout=0.02)


def test_closing_waits_for_copies_and_says_when_they_do_not_end():
    class Copy:
        left = 3

        def query(self):
            self.left -= 1
            return self.left < 0

    copy = Copy()
    rank = OneRank()
    rank.cache._residency._copier.to_host = lambda device, host: copy
    rank.serve(range(20))
    assert rank.cache.busy
    rank.cache.close()
    assert copy.left < 0
    rank.settle()
    rank.serve(range(50, 62))
    copy.left = 1 << 60
    with pytest.raises(CommplaneError, match=r"1 copies between device and host have not ended within 0\.02 s"):
        rank.cache.close(timeout=0.02)


@pytest.mark.parametrize("length", [0, 2, 9])
@pytest.mark.parametrize("what", ["exists", "get", "put"])
def test_a_store_that_answers_for_another_number_of_pages_has_failed(what, length):
    class Short(SeededStore):
        def poll(self, timeout=0.0):
            return [StoreDone(d.ticket, (True,) * length, "gone") if d.ticket in wrong else d for d in super().poll(timeout)]

    wrong = set()
    store = Short(delay=1)
    first = OneRank(store=store)
    submit = getattr(store, f"submit_{what}")

    def noted(*given):
        wrong.add(ticket := submit(*given))
        return ticket

    setattr(store, f"submit_{what}", noted)
    assert first.serve(range(20)) == 5
    first.settle()
    if what == "put":
        failed = first
        assert first.cache.counters.storage.failed == 5
        assert not any(node.stored for node in first.cache.tree.nodes())
    else:
        failed = OneRank(store=store, prefetch="wait_complete")
        assert failed.serve(range(20)) == 5, "nothing came from storage"
    assert failed.cache.storage_error == f"the store answered for {length} of 5 pages: gone"


def test_rounds_that_carry_other_fields_are_refused_when_the_cache_is_made():
    rounds = SimpleNamespace(fields={f"cache.{f.name}": f for f in cache_sync_spec(4).fields})
    with pytest.raises(ConfigError, match=r"these differ: cache.level, cache.pages, .*specs=\[\"cache\"\]"):
        PrefixCache(rounds, 4)
    rounds.fields = {f"cache.{f.name}": f for f in cache_sync_spec().fields} | {"disagg_rooms.status": SyncField("status", "min")}
    with pytest.raises(ConfigError, match=r"these differ: disagg_rooms.status; make them"):
        PrefixCache(rounds, 4)


def test_memory_may_be_a_tensor_of_any_dtype():
    device, host = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(6, 8, dtype=torch.bfloat16)
    copier = FlatCopier(device, host, 16)
    device[2] = 7
    copier.to_host(np.array([2, 0]), np.array([5, 1]))
    assert host[5].tolist() == [7.0] * 8
    copier.to_device(np.array([5]), np.array([3]))
    assert device[3].tolist() == [7.0] * 8
    tier = HostTier(host, 16)
    assert tier.pages == 6
    assert bytes(tier.views(np.array([5]))[0]) == device[2].view(torch.uint8).numpy().tobytes()


def test_prometheus_gets_every_counter_with_its_tier():
    rank = OneRank(device=6, host=30, store=SeededStore())
    for _ in range(2):
        rank.serve(range(20))
        rank.settle()
        rank.serve(range(100, 124))
        rank.settle()
    registry = CollectorRegistry()
    registry.register(CacheCollector(rank.cache.counters, rank.cache.owned, {"rank": "0"}))

    def value(name, **labels):
        return registry.get_sample_value(f"commplane_cache_{name}", {"rank": "0", **labels})

    assert value("hits_pages_total", tier="host") == rank.cache.counters.host.hits > 0
    assert value("evicted_pages_total", tier="device") == rank.cache.counters.device.evicted > 0
    assert value("filled_pages_total", tier="storage") == 11
    assert value("rounds_total") == rank.cache.counters.rounds
    assert value("pages", tier="device", owner="tree") == rank.cache.owned()["device"]["tree"]
    assert sum(value("pages", tier="host", owner=o) for o in ("free", "held", "moving", "tree")) == 30
    assert b"commplane_cache_failed_pages_total" in generate_latest(registry)
    assert json.loads(json.dumps(rank.cache.counters.to_json()))["device"]["filled"] > 0


def test_the_wheel_registers_the_fields_of_the_round():
    (spec,) = commplane_register_cache_sync()
    assert spec == cache_sync_spec()
    assert [f.name for f in spec.fields] == ["free", "ended", "good", "queued", "pages", "level", "stop"]
