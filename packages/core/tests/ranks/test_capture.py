"""The capture guard and the vote after a capture, threads as ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faulty
import pytest
import torch

from commplane import errors
from commplane.api import Capability
from commplane.plugins import PluginHost
from commplane.runtime import Communicator, Plane
from commplane.testing import run_threads


class Observer:
    """Counts what a plugin is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @faulty.hookimpl
    def commplane_capture_begin(self, communicator: Communicator) -> None:
        self.seen.append("begin")

    @faulty.hookimpl
    def commplane_capture_end(self, communicator: Communicator, error: BaseException | None) -> None:
        self.seen.append("end" if error is None else f"end with {type(error).__name__}")

    @faulty.hookimpl
    def commplane_fault(self, communicator: Communicator, error: BaseException) -> None:
        self.seen.append(f"fault {type(error).__name__}")


def capturing_host(_rank: int) -> PluginHost:
    return faulty.host(capabilities={Capability.ALL_REDUCE, Capability.CAPTURE})


def run(
    function: Callable[[Plane], Any], world_size: int = 2, plugins: Callable[[int], PluginHost] = capturing_host
) -> list[Any]:
    return run_threads(world_size, function, plugins=plugins, config=lambda _rank: {"timeout": 5})


def good(results: list[Any]) -> list[Any]:
    for r in results:
        if isinstance(r, Exception):
            raise r
    return results


def test_equal_captures_pass_and_the_communicator_goes_on() -> None:
    def rank_main(plane: Plane) -> list[float]:
        tp = plane.communicator("tp")
        with plane.capture():
            inside = tp.all_reduce(torch.ones(2))
            tp.all_reduce_(inside)
        return [inside[0].item(), tp.all_reduce(torch.ones(1)).item()]

    assert good(run(rank_main)) == [[4.0, 2.0]] * 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            ([2, 2], [2]),
            r"rank 0 2, rank 1 1 in all\), first at number 2: rank 0 has all_reduce\(sum torch.float32 8 bytes\); rank 1 has no",
        ),
        (([], [2]), r"first at number 1: rank 0 has nothing"),
    ],
)
def test_ranks_that_captured_different_operations_all_raise(sizes: tuple[list[int], list[int]], words: str) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        # One at a time through a backend that would wait for its peer: the records differ, the calls do not happen.
        tp._named["faulty"].all_reduce_ = lambda tensor, op: tensor  # type: ignore[method-assign]
        with pytest.raises(errors.CaptureError, match=words), plane.capture():
            for n in sizes[tp.rank]:
                tp.all_reduce(torch.ones(n))
        with pytest.raises(errors.CaptureError, match="poisoned"):
            tp.all_reduce(torch.ones(1))

    good(run(rank_main))


def test_a_failure_inside_a_capture_is_carried_to_every_rank() -> None:
    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        try:
            with plane.capture():
                if tp.rank == 1:
                    raise ValueError("out of luck")
        except (errors.CaptureError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    said = good(run(rank_main, world_size=3))
    assert said[1] == "ValueError: out of luck"
    for r in (0, 2):
        assert said[r] == f"CaptureError: [tp rank {r}/3] rank 1 failed inside the capture: ValueError: out of luck"


@pytest.mark.parametrize(
    "what",
    [
        lambda plane, tp: tp.prepare("all_reduce", max_bytes=8),
        lambda plane, tp: tp.empty(3),
        lambda plane, tp: tp.close(),
        lambda plane, tp: plane.communicator("other"),
        lambda plane, tp: plane.gather(1, what="a gather"),
        lambda plane, tp: plane.close(),
        lambda plane, tp: plane.capture().__enter__(),
    ],
    ids=["prepare", "empty", "close", "communicator", "gather", "plane.close", "nested capture"],
)
def test_control_plane_calls_inside_a_capture_raise(what: Callable[[Plane, Communicator], Any]) -> None:
    def rank_main(plane: Plane) -> float:
        tp = plane.communicator("tp")
        with plane.capture(), pytest.raises(errors.CaptureError, match="inside a capture"):
            what(plane, tp)
        return tp.all_reduce(torch.ones(1)).item()

    assert good(run(rank_main)) == [2.0, 2.0]


def test_capture_with_a_refused_backend_passes_through() -> None:
    """The behaviour of a backend that is off: no vote, no call into it."""
    faulty.FAULT = faulty.Fault("probe", "refuse", 0)
    try:

        def rank_main(plane: Plane) -> float:
            tp = plane.communicator("tp")
            assert tp.plan.backends == ("torch",) and not tp.captures
            with plane.capture():
                # Different on each rank, and of no concern to anybody.
                if tp.rank == 0:
                    torch.ones(1)
                return tp.all_reduce(torch.ones(1)).item()

        assert good(run(rank_main)) == [2.0, 2.0]
    finally:
        faulty.FAULT = faulty.Fault()


def test_overlapping_communicators_vote_in_the_order_of_their_creation() -> None:
    def rank_main(plane: Plane) -> list[float]:
        groups = [plane.communicator("g", g) for g in ([0, 1], [1, 2], [0, 2]) if plane.rank in g]
        with plane.capture():
            return [g.all_reduce(torch.tensor([2.0**plane.rank])).item() for g in groups]

    assert good(run(rank_main, world_size=3)) == [[3.0, 5.0], [3.0, 6.0], [6.0, 5.0]]


def test_plugins_are_told_of_captures_and_faults() -> None:
    observers = [Observer(), Observer()]

    def plugins(rank: int) -> PluginHost:
        host = capturing_host(rank)
        host.register(observers[rank], "observer")
        return host

    def rank_main(plane: Plane) -> None:
        plane.communicator("tp")
        with plane.capture():
            pass
        with pytest.raises((errors.CaptureError, ValueError)), plane.capture():
            if plane.rank == 1:
                raise ValueError("no")

    good(run(rank_main, plugins=plugins))
    assert observers[0].seen == ["begin", "end", "begin", "fault CaptureError", "end with CaptureError"]
    assert observers[1].seen == ["begin", "end", "begin", "fault CaptureError", "end with ValueError"]


def test_a_poisoned_communicator_refuses_a_capture_and_leaves_the_others_usable() -> None:
    def rank_main(plane: Plane) -> float:
        good_one, bad_one = plane.communicator("good"), plane.communicator("bad")
        bad_one.poison(errors.PeerError("lost", [1]))
        with pytest.raises(errors.PeerError, match="poisoned"), plane.capture():
            pass
        good_one.prepare("all_reduce", max_bytes=8)
        return good_one.all_reduce(torch.ones(1)).item()

    assert good(run(rank_main)) == [2.0, 2.0]


def test_a_policy_that_raises_on_one_rank_is_heard_by_the_others_at_once() -> None:
    class Policy:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        @faulty.hookimpl
        def commplane_select_backend(self, request: Any, candidates: Any) -> None:
            if self.rank == 1:
                raise RuntimeError("no opinion")

    def plugins(rank: int) -> PluginHost:
        host = capturing_host(rank)
        host.register(Policy(rank), "policy")
        return host

    def rank_main(plane: Plane) -> None:
        plane.communicator("tp")

    said = run_threads(2, rank_main, plugins=plugins, config=lambda _rank: {"timeout": 30}, timeout=25)
    for error in said:
        assert isinstance(error, errors.SelectionError) and "rank 1: RuntimeError: no opinion" in str(error), said


def test_a_policy_that_answers_differently_on_the_ranks_is_an_error_on_all() -> None:
    class Policy:
        def __init__(self, rank: int) -> None:
            self.rank = rank

        @faulty.hookimpl
        def commplane_select_backend(self, request: Any, candidates: Any) -> list[str]:
            return [[], ["faulty", "faulty"]][self.rank]

    def plugins(rank: int) -> PluginHost:
        host = capturing_host(rank)
        host.register(Policy(rank), "policy")
        return host

    said = run_threads(2, lambda plane: plane.communicator("tp"), plugins=plugins, config=lambda _rank: {"timeout": 5})
    assert [type(s).__name__ for s in said] == ["AgreementError"] * 2, said
