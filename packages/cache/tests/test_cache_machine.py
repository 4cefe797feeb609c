"""A state machine: whatever is called in whatever order, the cache comes to the segments of a naive model, on the same tiers."""

from __future__ import annotations

import cache_naive_model as naive
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from commplane.errors import ConfigError
from commplane.testing import SimulatedRounds
from commplane_cache.agreed import cache_sync_spec
from commplane_cache.cache import PrefixCache
from commplane_cache.options import CacheOptions
from commplane_cache.tiers import FlatCopier, HostTier
from commplane_cache.tree import TokenRun

PAGE = 2
prompts = st.lists(st.integers(0, 1), min_size=PAGE, max_size=9 * PAGE)
priorities = st.integers(0, 2)


def pages_of(tokens):
    return tuple(tuple(tokens[i : i + PAGE]) for i in range(0, len(tokens) - PAGE + 1, PAGE))


class CacheMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(sorted(naive.ORDERS)),
        write=st.sampled_from(["write_through", "write_through_selective", "write_back"]),
        device=st.integers(4, 14),
        host=st.integers(2, 20),
    )
    def begin(self, policy, write, device, host):
        self.memory = np.zeros((device, 8), np.uint8), np.zeros((host, 8), np.uint8)
        self.cache = PrefixCache(
            SimulatedRounds(1, [cache_sync_spec()])[0],
            device,
            HostTier(self.memory[1], 8),
            copier=FlatCopier(*self.memory, 8),
            options=CacheOptions(page_tokens=PAGE, evict=policy, write=write),
        )
        self.model = naive.NaiveCache(policy, write, device, host)
        self.locked: list[tuple] = []  # node, segments
        self.held: list[np.ndarray] = []
        self.step()

    @rule()
    def step(self):
        self.cache.step()
        self.model.step()

    @rule(tokens=prompts, priority=priorities)
    def look_up(self, tokens, priority):
        known = self.cache.match(TokenRun(tokens, PAGE), priority=priority)
        device, host = self.model.match(pages_of(tokens), priority)
        assert (known.device, known.host) == tuple(sum(len(s.pages) for s in part) for part in (device, host))
        self.look_at(known, tokens)

    @rule(tokens=prompts, priority=priorities, keep=st.booleans())
    def serve(self, tokens, priority, keep):
        run, pages = TokenRun(tokens, PAGE), pages_of(tokens)
        known = self.cache.match(run, priority=priority)
        device, _ = self.model.match(pages, priority)
        if any(s.device == "moving" for s in self.model.segments):
            return
        self.cache.lock(known.device_node)
        self.model.lock(device, 1)
        wanted = run.pages - known.device
        own = self.allocate(wanted)
        if own is not None:
            self.fill(own, tokens, known.device)
            done = self.cache.insert(run, own, start=known.device, priority=priority)
            path = self.model.insert(pages, known.device, priority)
            assert len(done.pages) == wanted
            if keep:
                self.cache.lock(done.node)
                self.model.lock(path, 1)
                self.locked.append((done.node, path[-1:]))
        self.cache.unlock(known.device_node)
        self.model.lock(device, -1)

    @rule(tokens=prompts)
    def load(self, tokens):
        known = self.cache.match(TokenRun(tokens, PAGE), again=True)
        _, host = self.model.match(pages_of(tokens), 0, again=True)
        self.cache.load_back(known)
        self.model.load(host)

    @precondition(lambda self: self.locked)
    @rule(which=st.integers(0, 100))
    def let_go(self, which):
        node, segments = self.locked.pop(which % len(self.locked))
        self.cache.unlock(node)
        self.model.lock(segments, -1)

    @rule(count=st.integers(1, 6))
    def hold(self, count):
        own = self.allocate(count)
        if own is not None:
            self.held.append(own)

    @precondition(lambda self: self.held)
    @rule()
    def give_back(self):
        own = self.held.pop()
        self.cache.release(own)
        self.model.free_device += len(own)

    @invariant()
    def same_segments(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        assert self.picture() == self.model.picture()
        owned = self.cache.owned()
        assert (owned["device"]["free"], owned["host"]["free"]) == (self.model.free_device, self.model.free_host)

    def picture(self):
        out, todo = [], [((), child) for child in self.cache.tree.root.children.values()]
        for before, node in todo:
            end = before + pages_of(np.frombuffer(node.key, "<i4").tolist())
            tiers = [
                ("here" if ready else "moving") if pages is not None else ""
                for pages, ready in ((node.device, node.device_ready), (node.host, node.host_ready))
            ]
            out.append((end, node.count, *tiers, node.clock, node.hits, node.priority, node.locks))
            todo.extend((end, child) for child in node.children.values())
        return sorted(out)

    def allocate(self, pages):
        if pages > self.cache.device_pages:
            with pytest.raises(ConfigError, match="refuse the request"):
                self.cache.allocate(pages)
            assert not self.model.allocate(pages)
            return None
        own = self.cache.allocate(pages)
        assert (own is not None) == self.model.allocate(pages)
        return own

    def fill(self, own, tokens, start):
        keys = TokenRun(tokens, PAGE).keys(start, start + len(own))
        for page, key in zip(own, keys, strict=True):
            self.memory[0][page] = np.frombuffer(key[:8], np.uint8)

    def look_at(self, known, tokens):
        for page, key in zip(known.pages, TokenRun(tokens, PAGE).keys(0, known.device), strict=True):
            assert bytes(self.memory[0][page]) == key[:8]


@pytest.mark.timeout(120)
def test_the_cache_comes_to_the_segments_of_a_naive_model():
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)),
    )
