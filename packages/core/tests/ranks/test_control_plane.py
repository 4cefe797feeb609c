"""Rounds of the control plane when something goes wrong: stale keys, different calls, interrupts, a store that hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import faulty
import pytest
import torch
from torch.distributed import HashStore

import commplane
from commplane import errors, hookimpl
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.testing import run_threads

# Longer than a test may take: whoever waits for a deadline fails it.
FOREVER_S = 300
LIMIT_S = 40


def run(
    world_size: int,
    function: Callable[[Plane], Any],
    config: Mapping[str, Any] | None = None,
    plugins: Callable[[int], PluginHost] = lambda _rank: PluginHost(),
) -> list[Any]:
    settings = {"timeout": FOREVER_S, **(config or {})}
    return run_threads(world_size, function, config=lambda _rank: settings, plugins=plugins, timeout=LIMIT_S)


def start_all(function: Callable[[int], Any], world_size: int = 2) -> list[Any]:
    """`function` on threads, without a plane of run_threads' own."""
    out: list[Any] = [TimeoutError("did not finish")] * world_size

    def rank_main(rank: int) -> None:
        try:
            out[rank] = function(rank)
        except BaseException as error:
            out[rank] = error

    threads = [threading.Thread(target=rank_main, args=(r,), daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    return out


def test_a_store_serves_one_plane_after_the_other() -> None:
    store = HashStore()

    def rank_main(rank: int) -> list[Any]:
        said = []
        for i in range(3):
            with commplane.init(store=store, rank=rank, world_size=2, plugins=PluginHost()) as plane:
                tp = plane.communicator("tp")
                tp.prepare("all_reduce", max_bytes=1 << 10)
                said.append([plane.gather([rank, i], what="a gather"), tp.all_reduce(torch.ones(1)).item()])
        return said

    wanted = [[[[0, i], [1, i]], 2.0] for i in range(3)]
    assert start_all(rank_main) == [wanted, wanted]


def test_a_rank_that_started_again_alone_is_told_so() -> None:
    store = HashStore()
    store.add("generation/1", 1)  # rank 1 has been here before

    def rank_main(rank: int) -> None:
        commplane.init(store=store, rank=rank, world_size=2, plugins=PluginHost(), config={"timeout": 8})

    out = start_all(rank_main)
    assert any(isinstance(e, errors.AgreementError) and "rank 1 has called it 2 times" in str(e) for e in out), out
    assert all(isinstance(e, (errors.AgreementError, errors.PeerError)) for e in out), out


def test_a_communicator_that_failed_does_not_condemn_the_next_one() -> None:
    late = threading.Event()

    def rank_main(plane: Plane) -> float:
        with pytest.raises(errors.PluginNotFound):
            plane.communicator("a", backends=["nonexistent"])
        if plane.rank == 1:
            late.wait(1.5)  # long enough for the other rank to look for reasons
        return plane.communicator("b").all_reduce(torch.ones(1)).item()

    assert run(2, rank_main) == [2.0, 2.0]


def test_ranks_that_make_different_calls_are_told_at_once() -> None:
    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        with pytest.raises(errors.AgreementError, match="ranks make different calls") as caught:
            if plane.rank == 0:
                plane.gather(5, what="a gather")
            else:
                plane.gather(5, what="another gather")
        tp.barrier()
        return str(caught.value)

    for text in run(2, rank_main):
        assert "rank 0 in 'a gather', rank 1 in 'another gather'" in text


def test_after_an_interrupted_round_a_rank_raises_instead_of_answering_one_round_late() -> None:
    def rank_main(plane: Plane) -> None:
        if plane.rank == 1:
            # The leader had seen everybody come when it was interrupted: this rank waits in vain, and never gets a mix.
            with pytest.raises(errors.CommplaneError):
                plane.gather("A1", what="gather", timeout=1.5)
            return
        real = plane._world._wait

        def interrupted(*arguments: Any) -> None:
            plane._world._wait = real  # type: ignore[method-assign]
            real(*arguments)
            raise KeyboardInterrupt

        plane._world._wait = interrupted  # type: ignore[method-assign,assignment]
        with pytest.raises(KeyboardInterrupt):
            plane.gather("A0", what="gather")
        with pytest.raises(errors.AgreementError, match="was interrupted by KeyboardInterrupt"):
            plane.gather("B0", what="gather")

    assert run(2, rank_main, {"timeout": 3}) == [None, None]


class HangingStore:
    """A store whose host is stopped once `hang` is set: calls do not return."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.hang = threading.Event()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any) -> Any:
            if self.hang.is_set():
                threading.Event().wait()
            return method(*args)

        return call


def test_a_store_that_does_not_answer_is_an_error_after_the_deadline() -> None:
    shared = HashStore()
    stores = [HangingStore(shared), HangingStore(shared)]

    def rank_main(rank: int) -> str:
        plane = commplane.init(store=stores[rank], rank=rank, world_size=2, plugins=PluginHost(), config={"timeout": 3})
        if rank == 0:
            return ""
        stores[rank].hang.set()
        with pytest.raises(errors.PeerError, match="the store has not answered for 3 s"):
            plane.gather(1, what="a gather")
        with pytest.raises(errors.PeerError):
            plane.gather(1, what="a gather")
        return "raised"

    assert start_all(rank_main)[1] == "raised"


def test_a_rank_that_left_is_noticed_without_waiting_for_the_deadline() -> None:
    def rank_main(plane: Plane) -> tuple[int, ...]:
        plane.communicator("a")
        if plane.rank == 1:
            raise ValueError("user code")
        with pytest.raises(errors.PeerError, match=r"rank 1 will not come .*left after an error") as caught:
            plane.communicator("b")
        return caught.value.missing_ranks

    out = run(2, rank_main)
    assert out[0] == (1,) and isinstance(out[1], ValueError), out


def test_a_wrong_setting_on_one_rank_is_an_error_on_all() -> None:
    store = HashStore()

    def rank_main(rank: int) -> None:
        commplane.init(
            store=store,
            rank=rank,
            world_size=2,
            plugins=PluginHost(),
            config={"timeout": "soon"} if rank else {"timeout": FOREVER_S},
        )

    out = start_all(rank_main)
    assert isinstance(out[1], errors.ConfigError) and isinstance(out[0], errors.AgreementError), out
    assert "wanted a number of seconds above 0, found 'soon'" in str(out[0])


def test_ranks_that_count_the_job_differently_are_told() -> None:
    store = HashStore()

    def rank_main(rank: int) -> None:
        commplane.init(store=store, rank=rank, world_size=2 + rank, plugins=PluginHost(), config={"timeout": 5})

    out = start_all(rank_main)
    assert all(isinstance(e, errors.CommplaneError) for e in out), out
    assert any("world_size=2" in str(e) and "world_size=3" in str(e) for e in out), out


def test_an_unexpected_exception_in_an_operation_poisons_because_ranks_are_out_of_step() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        if plane.rank == 1:
            tp._named["faulty"].all_reduce_ = lambda tensor, op: 1 / 0  # type: ignore[method-assign]
        else:
            tp._named["faulty"].all_reduce_ = lambda tensor, op: tensor  # type: ignore[method-assign]
        if plane.rank == 1:
            with pytest.raises(ZeroDivisionError):
                tp.all_reduce_(torch.ones(1))
            with pytest.raises(errors.CommunicatorError, match="poisoned by an earlier fault"):
                tp.all_reduce_(torch.ones(1))

    assert run(2, rank_main, plugins=lambda _rank: faulty.host()) == [None, None]


class Configured:
    """Takes notice of the settings, or refuses them."""

    def __init__(self, broken: bool) -> None:
        self.broken = broken
        self.seen: list[float] = []

    @hookimpl
    def commplane_configure(self, config: Any) -> None:
        if self.broken:
            raise RuntimeError("cannot live with that")
        self.seen.append(config.timeout)


def test_a_plugin_that_raises_on_its_settings_is_left_out_and_stops_no_other() -> None:
    good = [Configured(False), Configured(False)]

    def plugins(rank: int) -> PluginHost:
        host = PluginHost()
        host.register(Configured(True), "broken")
        host.register(good[rank], "good")
        return host

    def rank_main(plane: Plane) -> float:
        assert [p.plugin for p in plane.plugins.problems] == ["broken"]
        return plane.communicator("tp").all_reduce(torch.ones(1)).item()

    with pytest.warns(errors.CommplaneWarning, match="cannot live with that"):
        assert run(2, rank_main, plugins=plugins) == [2.0, 2.0]
    assert [g.seen for g in good] == [[FOREVER_S], [FOREVER_S]]


def test_two_control_plane_calls_that_differ_poison_the_communicator_on_both_ranks() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.AgreementError, match="ranks make different calls"):
            if plane.rank:
                tp.prepare("all_reduce", max_bytes=8)
            else:
                tp.empty(8)
        with pytest.raises(errors.AgreementError, match="poisoned"):
            tp.all_reduce(torch.ones(1))

    assert run(2, rank_main) == [None, None]


def test_a_policy_that_fails_on_one_rank_is_the_error_whatever_the_others_answer() -> None:
    class Policy:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        @hookimpl
        def commplane_select_backend(self, request: Any, candidates: Any) -> Any:
            if self.rank:
                raise RuntimeError("no opinion")
            return tuple(candidates)

    def plugins(rank: int) -> PluginHost:
        host = PluginHost()
        host.register(Policy(rank), "policy")
        return host

    for error in run(2, lambda plane: plane.communicator("tp"), plugins=plugins):
        assert isinstance(error, errors.SelectionError) and "rank 1: RuntimeError: no opinion" in str(error), error
