"""The cache over core's own rounds, threads as ranks: TP, CP and both, blocking and pipelined; ranks missing or different."""

from __future__ import annotations

from dataclasses import replace

import pytest

import commplane_cache.plugin
from commplane.api import ParallelLayout, SyncField, SyncSpec, hookimpl
from commplane.errors import ConfigError, MismatchError, PeerError
from commplane.plugins import PluginHost
from commplane.testing import run_threads
from commplane_cache.agreed import SLOTS
from commplane_cache.cache import PrefixCache
from commplane_cache.options import CacheOptions
from commplane_cache.simulator import Scenario
from commplane_cache.simulator.rank import Faults, Rank
from commplane_cache.simulator.workload import Workload

pytestmark = pytest.mark.timeout(90)


def plugins(_rank):
    host = PluginHost()
    host.register(commplane_cache.plugin, "cache", dist="commplane-cache", version="0.1.0")
    return host


def ranks(world_size, function, **config):
    settings = {"timeout": 20, **config}
    return run_threads(world_size, function, plugins=plugins, config=lambda _rank: settings)


def player(plane, rounds, *, pipelined, seed=18):
    scenario = Scenario(ranks=rounds.world_size, seed=seed)
    options = replace(scenario.cache_options(), prefetch_slots=SLOTS, pipelined=pipelined)
    faults = Faults().of_one(rounds.world_size)
    rank = Rank(rounds.rank, seed, rounds, options, faults, scenario.device, scenario.host)
    return rank, Workload(seed, rounds.world_size, arrive=0.5, abort=0.05)


@pytest.mark.parametrize(
    ("kind", "pipelined"), [("one rank", True), ("tp", False), ("cp", True), ("tp x cp", False), ("tp x cp", True)]
)
def test_caches_of_a_group_stay_equal(kind, pipelined):
    layout = ParallelLayout(world_size=4, tensor=4, context=2)
    groups = {
        "one rank": [[r] for r in range(4)],
        "tp": layout.attention_tp,
        "cp": layout.attention_cp,
        "tp x cp": layout.attention,
    }[kind]

    def main(plane):
        mine = next(list(g) for g in groups if plane.rank in g)
        rounds = plane.sync_round("cache", mine)
        rank, workload = player(plane, rounds, pipelined=pipelined)
        for _ in range(40):
            rank.cache.step()
            rank.play(workload.step())
        rank.check()
        return tuple(mine), rank.cache.digest, rank.served

    out = ranks(4, main)
    assert not [o for o in out if isinstance(o, Exception)], out
    for group in groups:
        assert len({out[r] for r in group}) == 1
    assert all(served > 2 for _, _, served in out)


def test_rounds_for_the_cache_are_of_its_spec_alone_whatever_else_is_installed():
    class Other:
        @hookimpl
        def commplane_register_cache_sync(self):
            return [SyncSpec(name="other", api=(1, 0), fields=(SyncField("x", "min"),))]

    def both(rank):
        host = plugins(rank)
        host.register(Other(), "other", dist="other", version="1.0")
        return host

    def main(plane):
        with pytest.raises(ConfigError, match=r'these differ: other.x; make them with plane.sync_round\(..., specs=\["cache"\]'):
            PrefixCache(plane.sync_round("all"), 8)
        ranks = ParallelLayout(world_size=2, tensor=2, context=2).of(plane.rank).groups["attention"]
        cache = PrefixCache(plane.sync_round("cache", ranks, specs=["cache"]), 8)
        cache.step()
        return cache.device_pages

    assert run_threads(2, main, plugins=both, config=lambda _rank: {"timeout": 20}) == [8, 8]


def test_a_rank_that_runs_no_round_is_named_on_all_others():
    def main(plane):
        rank, workload = player(plane, plane.sync_round("cache", timeout=1.0), pipelined=False)
        for i in range(20):
            if i == 10 and plane.rank == 1:
                return "left"
            rank.cache.step()
            rank.play(workload.step())
        return "went on"

    out = ranks(3, main)
    for rank in (0, 2):
        assert isinstance(out[rank], PeerError)
        assert out[rank].missing_ranks == (1,)


def test_ranks_with_other_settings_are_found_in_the_first_step():
    def main(plane):
        options = CacheOptions(evict="lfu" if plane.rank == 1 else "lru", decisions=plane.rank, writer=plane.rank == 0)
        cache = PrefixCache(plane.sync_round("cache"), 8, options=options)
        cache.step()

    out = ranks(3, main)
    assert [type(o) for o in out] == [MismatchError] * 3
    assert all("rank 1" in str(o) for o in out)


def test_a_rank_whose_tree_differs_is_found_in_the_next_step():
    def main(plane):
        rank, workload = player(plane, plane.sync_round("cache"), pipelined=False)
        for i in range(20):
            rank.cache.step()
            rank.play(workload.step())
            if i == 10 and plane.rank == 2:
                rank.cache.tree.clock += 1
        return "went on"

    out = ranks(3, main)
    assert [type(o) for o in out] == [MismatchError] * 3
    assert all("rank 2" in str(o) for o in out)
