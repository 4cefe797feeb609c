"""Somebody else's code with a deadline. The calls wait for events, so nothing here depends on how fast a machine is."""

from __future__ import annotations

import threading
import time

import pytest

from commplane.agree.bounded import Abandoned, Stalled, call_bounded

# Never reached by a test that passes.
LONG_S = 60.0
# Certainly reached, because the call waits for an event that is set only afterwards.
SHORT_S = 0.01


def test_the_result_comes_back() -> None:
    assert call_bounded(lambda: 42, LONG_S, "probe") == 42


def test_none_is_a_result() -> None:
    assert call_bounded(lambda: None, LONG_S, "probe") is None


def test_the_call_runs_in_a_daemon_thread_of_its_own_that_is_named_for_it() -> None:
    def seen() -> tuple[threading.Thread, str, bool]:
        thread = threading.current_thread()
        return thread, thread.name, thread.daemon

    thread, name, daemon = call_bounded(seen, LONG_S, "probe of mine")
    assert thread is not threading.current_thread()
    assert (name, daemon) == ("commplane probe of mine", True)


def test_a_thread_that_has_returned_serves_the_next_call_and_one_that_has_not_does_not() -> None:
    go_on = threading.Event()
    stuck: list[threading.Thread] = []

    def sticks() -> None:
        stuck.append(threading.current_thread())
        go_on.wait(LONG_S)

    with pytest.raises(Stalled):
        call_bounded(sticks, 0.05, "probe")
    others = {call_bounded(threading.current_thread, LONG_S, "probe") for _ in range(20)}
    assert stuck[0] not in others and len(others) < 20
    go_on.set()


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_exception_comes_back_as_it_is(kind: type[BaseException]) -> None:
    error = kind("no driver")

    def fail() -> None:
        raise error

    with pytest.raises(kind) as caught:
        call_bounded(fail, LONG_S, "probe")
    assert caught.value is error


def test_a_call_in_time_is_not_late() -> None:
    late = threading.Event()
    call_bounded(lambda: None, LONG_S, "probe in time", on_late=late.set)
    while any(thread.name == "commplane probe in time" for thread in threading.enumerate()):
        time.sleep(0.001)
    assert not late.is_set()


def test_a_stalled_call_is_left_and_released_when_it_comes_back() -> None:
    go_on, came_back = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        go_on.wait(LONG_S)
        order.append("call")

    def release() -> None:
        order.append("release")
        came_back.set()

    with pytest.raises(Stalled, match=r"^build of mine did not finish in 0\.01 s$"):
        call_bounded(slow, SHORT_S, "build of mine", on_late=release)
    assert order == []
    go_on.set()
    assert came_back.wait(LONG_S)
    assert order == ["call", "release"]


def test_a_stalled_call_that_fails_in_the_end_is_released_too() -> None:
    go_on, came_back = threading.Event(), threading.Event()

    def slow() -> None:
        go_on.wait(LONG_S)
        raise RuntimeError("too late to matter")

    with pytest.raises(Stalled):
        call_bounded(slow, SHORT_S, "build", on_late=came_back.set)
    go_on.set()
    assert came_back.wait(LONG_S)


def test_a_stalled_call_needs_no_release() -> None:
    go_on, ended = threading.Event(), threading.Event()

    def slow() -> None:
        go_on.wait(LONG_S)
        ended.set()

    with pytest.raises(Stalled):
        call_bounded(slow, SHORT_S, "probe")
    go_on.set()
    assert ended.wait(LONG_S)


def test_a_call_is_left_as_soon_as_there_is_a_reason_not_to_wait_and_the_reason_is_the_cause() -> None:
    go_on, came_back = threading.Event(), threading.Event()
    reason = RuntimeError("rank 1 gave up")
    with pytest.raises(Abandoned, match=r"^build was given up$") as caught:
        call_bounded(lambda: go_on.wait(LONG_S), LONG_S, "build", on_late=came_back.set, give_up=lambda: reason)
    assert caught.value.__cause__ is reason
    assert not isinstance(caught.value, Stalled)
    go_on.set()
    assert came_back.wait(LONG_S)


def test_without_a_reason_to_give_up_the_result_is_waited_for() -> None:
    go_on = threading.Event()
    asked: list[None] = []

    def give_up() -> None:
        asked.append(None)
        go_on.set()

    assert call_bounded(lambda: go_on.wait(LONG_S), LONG_S, "build", give_up=give_up) is True
    assert asked


def test_the_deadline_holds_also_while_there_is_no_reason_to_give_up() -> None:
    go_on = threading.Event()
    with pytest.raises(Stalled):
        call_bounded(lambda: go_on.wait(LONG_S), SHORT_S, "build", give_up=lambda: None)
    go_on.set()
