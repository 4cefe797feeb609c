"""Ranks of a cache in one thread, whose storage does nothing before the test says so."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from commplane.api import PageStore, StoreDone, StoreUsage
from commplane.testing import SimulatedRounds
from commplane_cache.agreed import cache_sync_spec
from commplane_cache.cache import PrefixCache
from commplane_cache.options import CacheOptions
from commplane_cache.tiers import FlatCopier, HostTier
from commplane_cache.tree import TokenRun

PAGE = 2
BYTES = 8


@dataclass
class Batch:
    ticket: int
    what: str
    keys: list
    pages: list


class HandStore(PageStore):
    """Batches stay open until `end`."""

    def __init__(self):
        self.open_batches: list[Batch] = []
        self.batches = 0
        self.ended: list[StoreDone] = []

    def open(self, context):
        raise NotImplementedError

    def _add(self, what, keys, pages=()):
        self.batches += 1
        self.open_batches.append(Batch(self.batches, what, list(keys), list(pages)))
        return self.batches

    def submit_exists(self, keys):
        return self._add("exists", keys)

    def submit_get(self, keys, pages):
        return self._add("get", keys, pages)

    def submit_put(self, keys, pages):
        return self._add("put", keys, pages)

    def submit_remove(self, keys):
        return self._add("remove", keys)

    def end(self, what, good=None, error=None):
        """End the oldest open batch of that kind: its first `good` pages went well, all if unset."""
        batch = next(b for b in self.open_batches if b.what == what)
        self.open_batches.remove(batch)
        good = len(batch.keys) if good is None else good
        if what == "get":
            for key, page in zip(batch.keys[:good], batch.pages, strict=False):
                page[:] = key[:BYTES]
        self.ended.append(StoreDone(batch.ticket, tuple(i < good for i in range(len(batch.keys))), error))

    def poll(self, timeout=0.0):
        out, self.ended = self.ended, []
        return out

    def usage(self):
        return StoreUsage(None, None)

    def close(self):
        self.open_batches.clear()


class Group:
    """`n` ranks. Attributes: caches, stores, clocks (seconds, one a rank), device and host (memory, one a rank)."""

    def __init__(self, n, *, device=16, host=16, more=(), copiers=None, **options):
        options.setdefault("prefetch_slots", 2)
        self.n, self.clocks = n, [0.0] * n
        self.pipelined = options.get("pipelined", False)
        self.rounds = SimulatedRounds(n, [cache_sync_spec(options["prefetch_slots"])])
        sizes = [(device + extra, host + extra) for extra in (*more, *[0] * (n - len(more)))]
        self.device = [np.zeros((d, BYTES), np.uint8) for d, _ in sizes]
        self.host = [np.zeros((h, BYTES), np.uint8) for _, h in sizes]
        self.stores = [HandStore() for _ in range(n)]
        make = copiers or [FlatCopier] * n
        self.caches = [
            PrefixCache(
                self.rounds[i],
                sizes[i][0],
                HostTier(self.host[i], BYTES),
                self.stores[i],
                copier=make[i](self.device[i], self.host[i], BYTES),
                options=CacheOptions(page_tokens=PAGE, **options),
                clock=lambda i=i: self.clocks[i],
            )
            for i in range(n)
        ]
        self._first = True
        self.step()
        if self.pipelined:
            self.step()

    def step(self, times=1):
        for _ in range(times):
            if self.pipelined and not self._first:
                self.all(lambda c: c.result())
            self._first = False
            self.all(lambda c: c.issue())
            if not self.pipelined:
                self.all(lambda c: c.result())
            for cache in self.caches:
                cache.check()

    def all(self, call):
        """The same call on every rank; its answers must be equal where they can be compared."""
        answers = [call(cache) for cache in self.caches]
        if isinstance(answers[0], (bool, int, str, type(None))):
            assert len(set(answers)) == 1, f"ranks got {answers}"
        return answers[0]

    def end(self, what, good=None, ranks=None, error=None):
        for i in range(self.n) if ranks is None else ranks:
            self.stores[i].end(what, good[i] if isinstance(good, (list, tuple)) else good, error)

    def prefetch(self, name, tokens):
        run = TokenRun(tokens, PAGE)
        return self.all(lambda c: c.prefetch(name, run, c.match(run)))

    def check(self, name):
        return self.all(lambda c: c.check_prefetch_progress(name))

    def state(self, name):
        return self.all(lambda c: c.prefetch_state(name))

    def known(self, tokens):
        """Pages on device and host."""
        matches = [c.match(TokenRun(tokens, PAGE), again=True) for c in self.caches]
        answers = {(m.device, m.host) for m in matches}
        assert len(answers) == 1
        return answers.pop()

    def serve(self, tokens, priority=0):
        """Compute what the device does not have; whether there was room."""
        run = TokenRun(tokens, PAGE)

        def one(cache, memory):
            known = cache.match(run, priority=priority)
            cache.lock(known.device_node)
            own = cache.allocate(run.pages - known.device)
            if own is not None:
                for page, key in zip(own, run.keys(known.device, run.pages), strict=True):
                    memory[page] = np.frombuffer(key[:BYTES], np.uint8)
                cache.insert(run, own, start=known.device, priority=priority)
            cache.unlock(known.device_node)
            return own is not None

        answers = [one(*pair) for pair in zip(self.caches, self.device, strict=True)]
        assert len(set(answers)) == 1
        return answers[0]

    def owned(self, tier, owner):
        return [cache.owned()[tier][owner] for cache in self.caches]
