"""Tuning in CUDA graphs where a rank fails: threads as ranks, a capture that is one of the communicator and of no GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import faulty
import pytest

from commplane import errors
from commplane.api import Capability
from commplane.runtime import Communicator, Plane, communicator
from commplane.runtime.tune import measure
from commplane.runtime.tune.timer import by_clock
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def tuned_in_graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs two ranks that tune in graphs, with what each is to do on its way to its capture; what they are told."""
    subject_of = communicator.subject_of
    monkeypatch.setattr(communicator, "subject_of", lambda *arguments: replace(subject_of(*arguments), graph=True))

    def go(
        warm_up: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
        inside: Callable[[], object] = lambda: None,
    ) -> list[str]:
        def warmed_up(call: Callable[[], Any]) -> None:
            warm_up()
            call()

        def in_graphs(call: Callable[[], Any], stream: None, capturing: Callable[[], Any]) -> Any:
            before()
            with capturing():  # as on a GPU, what is captured does not run
                inside()
            return by_clock(call, "cpu")

        monkeypatch.setattr(measure, "warmed_up", warmed_up)
        monkeypatch.setattr(measure, "in_graphs", in_graphs)

        def rank_main(plane: Plane) -> str:
            with plane.communicator("tp") as tp:
                assert tp.captures
                try:
                    tp.tune("all_reduce", dtype="float32", sizes=[8192])
                    told = f"measured {len(tp.plan.timings.curves) if tp.plan.timings else 0}"
                except errors.CommplaneError as error:
                    told = f"{type(error).__name__}: {error}"
            assert tp.closed
            return told

        out: list[Any] = run_threads(
            2,
            rank_main,
            plugins=lambda _rank: faulty.host(capabilities={Capability.ALL_REDUCE, Capability.CAPTURE}),
            config=lambda _rank: {"timeout": 20},
        )
        for result in out:
            if isinstance(result, Exception):
                raise result
        return out

    return go


def test_where_nothing_fails_each_way_is_measured(tuned_in_graphs: Callable[..., list[str]]) -> None:
    assert tuned_in_graphs() == ["measured 2"] * 2


def on_one_rank(message: str) -> Callable[[], None]:
    """Raises on the first rank to come: the other one is not to wait for it where it cannot be told why."""
    come = iter([True])

    def act() -> None:
        if next(come, False):
            raise RuntimeError(message)

    return act


@pytest.mark.parametrize(("at", "step"), [("warm_up", "a warm-up of faulty"), ("before", "a graph of faulty")])
def test_a_rank_that_fails_before_its_capture_is_named_with_its_reason_on_all_and_all_can_close(
    at: str, step: str, tuned_in_graphs: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank is in the vote of the capture meanwhile, in a thread that is left to itself."""
    begun: list[Communicator] = []
    begin = Communicator._capture_begin

    def noted(self: Communicator) -> None:
        begun.append(self)
        begin(self)

    monkeypatch.setattr(Communicator, "_capture_begin", noted)
    first, second = tuned_in_graphs(**{at: on_one_rank("no such kernel")})
    for text in (first, second):
        assert text.startswith("CommunicatorError: [tp rank ")
        assert f"tune, {step}: failed on some ranks only" in text and ": RuntimeError: no such kernel" in text
    assert bool(begun) == (at == "before")


def test_a_rank_that_hangs_in_a_capture_which_another_one_missed_can_close_too(tuned_in_graphs: Callable[..., list[str]]) -> None:
    gone = threading.Event()
    try:
        texts = tuned_in_graphs(before=on_one_rank("no such kernel"), inside=lambda: gone.wait(50))
    finally:
        gone.set()
    assert all("failed on some ranks only" in text and ": RuntimeError: no such kernel" in text for text in texts)
