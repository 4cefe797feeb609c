"""Sync rounds on threads as ranks: pipelined and blocking, what is refused, what is told to whom, and how they end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from commplane import errors, hookimpl
from commplane.api import SyncField, SyncSpec, Vote
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(60)

ONE = SyncSpec(name="one", api=(1, 0), fields=(SyncField("sum", Vote.SUM), SyncField("row", Vote.MIN, 3)))
TWO = SyncSpec(name="two", api=(1, 0), fields=(SyncField("max", Vote.MAX),))


class Registers:
    def __init__(self, *specs: SyncSpec) -> None:
        self.specs = specs

    @hookimpl
    def commplane_register_cache_sync(self) -> list[SyncSpec]:
        return list(self.specs)


def plugins(_rank: int) -> PluginHost:
    host = PluginHost()
    host.register(Registers(ONE, TWO), "engine", dist="engine-wheel", version="1.0")
    return host


def run(world_size: int, function: Callable[[Plane], Any], *, timeout: float = 20, startup: float = 20) -> list[Any]:
    settings = {"timeout": timeout, "startup_timeout": startup}
    out = run_threads(world_size, function, plugins=plugins, config=lambda _rank: settings)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def test_a_round_issued_now_and_read_a_step_later_agrees_on_what_was_issued() -> None:
    def rank_main(plane: Plane) -> list[Any]:
        votes = plane.sync_round("steps", specs=[ONE])
        values: dict[str, Any] = {"one.sum": 1 + plane.rank, "one.row": [9, 9, plane.rank]}
        votes.issue(values)
        agreed: list[Any] = []
        for step in range(20):
            values["one.sum"] += 1  # what is out is what was given
            agreed.append(votes.result()["one.sum"])
            if step % 3 == 0:
                agreed.append(votes.step({**values, "one.sum": 100})["one.sum"])
            votes.issue(values)
        assert votes.result()["one.row"] == (9, 9, 0)
        assert votes.steps == len(agreed) + 1
        return [s for s in agreed if s != 300]

    assert run(3, rank_main) == [[6 + 3 * i for i in range(20)]] * 3


def test_the_specs_that_take_part_are_chosen_by_name_or_given() -> None:
    extra = SyncSpec(name="extra", api=(1, 0), fields=(SyncField("x", Vote.LEADER),))

    def rank_main(plane: Plane) -> list[list[str]]:
        fields = [
            list(plane.sync_round("all").fields),
            list(plane.sync_round("some", specs=["two"]).fields),
            list(plane.sync_round("more", specs=["two", extra]).fields),
        ]
        with plane.sync_round("agree", specs=[extra]) as votes:
            assert votes.step({"extra.x": 5 + plane.rank}) == {"extra.x": 5}
        return fields

    wanted = [["one.row", "one.sum", "two.max"], ["two.max"], ["extra.x", "two.max"]]
    assert run(2, rank_main) == [wanted, wanted]


def test_a_spec_that_one_rank_does_not_have_is_an_error_on_all() -> None:
    def rank_main(plane: Plane) -> None:
        known = "two" if plane.rank else "three"
        kind = errors.AgreementError if plane.rank else errors.ConfigError
        with pytest.raises(kind, match="no plugin registered 'three', found one, two: install the plugin"):
            plane.sync_round("x", specs=[known])

    run(2, rank_main)


def test_ranks_with_different_deadlines_are_told_before_the_first_step() -> None:
    def rank_main(plane: Plane) -> None:
        with pytest.raises(errors.MismatchError, match=r"rank 0 has timeout=3.0; rank 1 has timeout=4.0"):
            plane.sync_round("x", timeout=3 + plane.rank)
        kind = errors.AgreementError if plane.rank else errors.ConfigError
        with pytest.raises(kind, match="wanted seconds above 0, found 0"):
            plane.sync_round("x", timeout=plane.rank)

    run(2, rank_main)


def test_states_that_differ_are_named_on_all_ranks_and_end_the_round() -> None:
    def rank_main(plane: Plane) -> None:
        votes = plane.sync_round("x", specs=[TWO])
        votes.step({"two.max": 1}, digest=5)
        votes.issue({"two.max": 1}, digest=5 + (plane.rank == 1))
        words = "the state of the ranks differs before step 2: digest 0x5 on ranks 0, 2, rank 1 has 0x6"
        with pytest.raises(errors.MismatchError, match=words):
            votes.result()
        with pytest.raises(errors.MismatchError, match="poisoned by an earlier fault and must be closed"):
            votes.issue({"two.max": 1})
        votes.close()

    run(3, rank_main)


def test_one_round_is_out_at_a_time_and_none_after_close() -> None:
    def rank_main(plane: Plane) -> None:
        votes = plane.sync_round("x", specs=[TWO])
        with pytest.raises(errors.UnsupportedOperation, match="none is out"):
            votes.result()
        votes.issue({"two.max": plane.rank})
        for again in (votes.issue, votes.step):
            with pytest.raises(errors.UnsupportedOperation, match="step 1 is out already"):
                again({"two.max": 7})
        assert votes.result() == {"two.max": 1}
        votes.close()
        votes.close()
        with pytest.raises(errors.CommunicatorError, match="closed: create it again"):
            votes.step({"two.max": 7})
        with pytest.raises(errors.CommunicatorError, match="closed: create it again"):
            votes.result()

    run(2, rank_main)


def test_a_group_of_one_checks_and_agrees_without_a_communicator_or_a_thread() -> None:
    def rank_main(plane: Plane) -> None:
        before = threading.active_count()
        votes = plane.sync_round("x", [plane.rank], specs=[ONE])
        assert votes.step({"one.sum": 4, "one.row": (3, 2, 1)}) == {"one.sum": 4, "one.row": (3, 2, 1)}
        votes.issue({"one.sum": 5, "one.row": (3, 2, 1)})
        assert votes.result()["one.sum"] == 5 and votes.steps == 2
        with pytest.raises(errors.UnsupportedOperation, match=r"3 integers of 64 bits for one.row, found 7"):
            votes.step({"one.sum": 4, "one.row": 7})
        assert plane.communicators == () and threading.active_count() == before
        votes.close()

    run(1, rank_main)


def test_a_rank_that_leaves_a_round_out_is_named_to_the_ranks_that_step_and_to_those_that_issued() -> None:
    def rank_main(plane: Plane) -> float:
        votes = plane.sync_round("x", specs=[TWO], timeout=2)
        votes.step({"two.max": 1})
        began = time.monotonic()
        if plane.rank == 1:
            time.sleep(2.5)
            return 0.0
        with pytest.raises(errors.PeerError, match="sync round, step 2: rank 1 did not take part") as raised:
            if plane.rank == 0:
                votes.step({"two.max": 1})
            else:
                votes.issue({"two.max": 1})
                votes.result()
        assert raised.value.missing_ranks == (1,)
        took = time.monotonic() - began
        with pytest.raises(errors.PeerError, match="poisoned"):
            votes.step({"two.max": 1})
        return took

    out = run_threads(3, rank_main, plugins=plugins, config=lambda _rank: {"timeout": 20, "startup_timeout": 2})
    assert [type(o) for o in out] == [float] * 3, out
    # The deadline is 2 s; the rest is this machine's.
    assert max(o for o in out if isinstance(o, float)) < 10


def test_a_round_that_is_out_is_finished_by_close_and_leaves_no_thread() -> None:
    names: list[list[str]] = []

    def rank_main(plane: Plane) -> None:
        votes = plane.sync_round(f"closing{plane.world_size}", specs=[TWO], backends=["torch"])
        for _ in range(3):
            votes.issue({"two.max": 1})
            votes.result()
        votes.issue({"two.max": 1})
        names.append([t.name for t in threading.enumerate()])
        if plane.rank:
            votes.close()  # the others leave it to the plane

    run(2, rank_main)
    assert all("commplane sync closing2" in n for n in names)
    assert "commplane sync closing2" not in [t.name for t in threading.enumerate()]


@pytest.mark.filterwarnings("ignore::commplane.errors.CommplaneWarning")
def test_close_ends_although_another_rank_never_came_to_the_round_that_is_out() -> None:
    def rank_main(plane: Plane) -> None:
        votes = plane.sync_round("x", specs=[TWO], timeout=1)
        if plane.rank == 0:
            votes.issue({"two.max": 1})
        votes.close()

    out = run_threads(2, rank_main, plugins=plugins, config=lambda _rank: {"timeout": 4})
    assert out == [None, None]


def test_a_capture_passes_a_round_by() -> None:
    def rank_main(plane: Plane) -> None:
        votes, tp = plane.sync_round("x", specs=[TWO]), plane.communicator("tp")
        votes.issue({"two.max": plane.rank})
        with plane.capture():
            tp.all_reduce_(torch.ones(4))
            assert votes.result() == {"two.max": 1}
            assert votes.step({"two.max": 3 + plane.rank}) == {"two.max": 4}
        votes.close()

    run(2, rank_main)


def test_rounds_of_several_groups_do_not_mix() -> None:
    def rank_main(plane: Plane) -> list[Any]:
        everyone = plane.sync_round("all", specs=[TWO])
        pair = plane.sync_round("pair", [0, 1] if plane.rank < 2 else [3, 2], specs=[TWO])
        everyone.issue({"two.max": plane.rank})
        mine = [pair.step({"two.max": 10 * plane.rank + i})["two.max"] for i in range(3)]
        assert pair.ranks == ((0, 1) if plane.rank < 2 else (3, 2)) and everyone.result() == {"two.max": 3}
        return mine

    assert run(4, rank_main) == [[10, 11, 12]] * 2 + [[30, 31, 32]] * 2


def test_a_forked_child_cannot_use_the_rounds_of_its_parent() -> None:
    def rank_main(plane: Plane) -> None:
        votes = plane.sync_round("x", [plane.rank], specs=[TWO])
        child = os.fork()
        if child == 0:
            try:
                votes.step({"two.max": 1})
            except errors.CommunicatorError as error:
                os._exit(3 if "belongs to the parent process" in str(error) else 4)
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert votes.step({"two.max": 1}) == {"two.max": 1}

    run(1, rank_main)
