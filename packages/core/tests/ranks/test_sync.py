"""Sync rounds and bootstrap sync, threads as ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from commplane import errors, hookimpl
from commplane.api import Bootstrap, SyncField, SyncSpec, Vote
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads


class CachePlugin:
    """Registers one field for each rule."""

    def __init__(self, rules: list[Vote]) -> None:
        self.rules = rules

    @hookimpl
    def commplane_register_cache_sync(self) -> list[SyncSpec]:
        return [SyncSpec(name="cache", api=(1, 0), fields=tuple(SyncField(str(rule), rule) for rule in self.rules))]


def with_cache(rules: Callable[[int], list[Vote]] = lambda _rank: list(Vote)) -> Callable[[int], PluginHost]:
    def make(rank: int) -> PluginHost:
        host = PluginHost()
        host.register(CachePlugin(rules(rank)), "cache", dist="cache-wheel", version="1.0")
        return host

    return make


def run(world_size: int, function: Callable[[Plane], Any], plugins: Callable[[int], PluginHost]) -> list[Any]:
    out = run_threads(world_size, function, plugins=plugins, config=lambda _rank: {"timeout": 20})
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def test_each_rule_gives_one_value_on_all_ranks() -> None:
    def rank_main(plane: Plane) -> list[dict[str, int]]:
        votes = plane.sync_round("step")
        mine = [10 + plane.rank, 3 - plane.rank]
        one = int(plane.rank == 1)
        return [votes.step({"cache.any": one, "cache.all": one} | dict.fromkeys(numbers, m)) for m in mine]

    numbers = ["cache.min", "cache.max", "cache.sum", "cache.leader"]
    first = {"cache.any": 1, "cache.all": 0, "cache.min": 10, "cache.max": 12, "cache.sum": 33, "cache.leader": 10}
    second = {"cache.any": 1, "cache.all": 0, "cache.min": 1, "cache.max": 3, "cache.sum": 6, "cache.leader": 3}
    assert run(3, rank_main, with_cache()) == [[first, second]] * 3


def test_a_rank_that_is_a_step_behind_is_an_error_on_all() -> None:
    def rank_main(plane: Plane) -> None:
        votes = plane.sync_round("step")
        values = dict.fromkeys(votes.fields, 1)
        votes.steps += plane.rank  # rank 1 believes to be a step further
        with pytest.raises(errors.MismatchError, match="rank 0 at step 1, rank 1 at step 2"):
            votes.step(values)
        with pytest.raises(errors.MismatchError, match="poisoned"):
            votes.step(values)

    run(2, rank_main, with_cache())


def test_fields_are_checked_before_anything_is_sent() -> None:
    def rank_main(plane: Plane) -> int:
        votes = plane.sync_round("step")
        with pytest.raises(errors.UnsupportedOperation, match=r"missing: cache.all, .*unknown: cache.median"):
            votes.step({**dict.fromkeys(list(votes.fields)[1:], 0), "cache.median": 1})
        return votes.step(dict.fromkeys(votes.fields, 7))["cache.max"]

    assert run(2, rank_main, with_cache()) == [7, 7]


def test_ranks_with_different_schemas_are_told_before_the_first_step() -> None:
    def rank_main(plane: Plane) -> None:
        with pytest.raises(errors.MismatchError, match=r"arguments of sync round: rank 0 has cache.max='nothing'"):
            plane.sync_round("step")

    run(2, rank_main, with_cache(lambda rank: [Vote.MIN, Vote.MAX][: rank + 1]))


def test_without_registered_fields_a_round_is_only_a_meeting() -> None:
    assert run(2, lambda plane: plane.sync_round("step").step({}), lambda _rank: PluginHost()) == [{}, {}]


def test_bootstrap_sync_gives_the_leaders_value_and_a_plugin_may_know_better() -> None:
    class Highest:
        @hookimpl
        def commplane_sync_bootstrap(self, bootstrap: Bootstrap, value: int) -> int:
            return int(max(bootstrap.all_gather(value, what="highest port")))

    def other(_rank: int) -> PluginHost:
        host = PluginHost()
        host.register(Highest(), "highest")
        return host

    def rank_main(plane: Plane) -> int:
        return int(plane.sync_bootstrap(8998 + plane.rank))

    assert run(3, rank_main, lambda _rank: PluginHost()) == [8998] * 3
    assert run(3, rank_main, other) == [9000] * 3
