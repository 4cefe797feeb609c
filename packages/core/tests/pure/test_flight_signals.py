"""SIGUSR1: who gets it, and that it is given back."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from commplane.flight import signals
from commplane.flight.signals import SIGNAL


class Target:
    """Counts its dumps."""

    def __init__(self) -> None:
        self.count = 0
        self.threads: list[str] = []
        self.asked = threading.Event()

    def dump_on_signal(self) -> None:
        self.count += 1
        self.threads.append(threading.current_thread().name)
        self.asked.set()


@pytest.fixture
def target() -> Iterator[Target]:
    """Attached in the main thread; afterwards all is as it was."""
    until(lambda: threads() == 0)
    before = (signal.getsignal(SIGNAL), signals._action())
    made = Target()
    signals.attach(made)
    yield made
    signals.detach(made)
    assert (signal.getsignal(SIGNAL), signals._action()) == before
    holder = signal.set_wakeup_fd(-1)
    assert holder == -1
    until(lambda: threads() == 0)


def threads() -> int:
    return sum(t.name == f"commplane {SIGNAL.name}" for t in threading.enumerate())


def until(done: object) -> None:
    assert callable(done)
    while not done():  # the deadline is the test's
        time.sleep(0.01)


def send() -> None:
    os.kill(os.getpid(), SIGNAL)


def test_the_signal_dumps_in_a_thread_of_its_own(target: Target) -> None:
    send()
    assert target.asked.wait(30)
    assert target.threads[0] == f"commplane {SIGNAL.name}"


def test_every_plane_of_the_process_is_dumped(target: Target) -> None:
    other = Target()
    signals.attach(other)
    send()
    assert target.asked.wait(30) and other.asked.wait(30)
    signals.detach(other)
    target.asked.clear()
    send()
    assert target.asked.wait(30)
    assert other.count == 1


def test_the_signal_is_taken_until_the_last_plane_is_gone(target: Target) -> None:
    other = Target()
    signals.attach(other)
    signals.detach(other)
    send()  # would end the process if the default action were back
    assert target.asked.wait(30)


def test_one_signal_is_one_dump(target: Target) -> None:
    for n in range(1, 6):
        target.asked.clear()
        send()
        assert target.asked.wait(30)
        time.sleep(0.05)  # for a second one that must not come
        assert target.count == n


def test_a_dump_does_not_wait_for_the_main_thread(target: Target) -> None:
    """A wait in native code that is not interrupted: a lock, as Gloo's condition variable."""
    held = threading.Lock()
    held.acquire()
    seen = []

    def release() -> None:
        send_to_main()
        seen.append(target.asked.wait(30))
        held.release()

    def send_to_main() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, SIGNAL)

    thread = threading.Thread(target=release)
    thread.start()
    # Python looks for signals when this wait is interrupted; the handler is then in the main thread, the dump is not.
    held.acquire()
    thread.join()
    assert seen == [True]


def test_an_event_loop_that_takes_the_wakeup_descriptor_leaves_the_second_way(target: Target) -> None:
    async def main() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, lambda: None)
        send()
        while not target.asked.is_set():
            await asyncio.sleep(0.01)

    asyncio.run(main())
    assert target.count == 1


def test_a_wakeup_descriptor_of_somebody_else_is_left_alone() -> None:
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    made = Target()
    try:
        signals.attach(made)
        send()
        assert made.asked.wait(30)
        assert reader.recv(16) == bytes([SIGNAL])
        signals.detach(made)
    finally:
        assert signal.set_wakeup_fd(-1) == writer.fileno()
        reader.close()
        writer.close()


def test_a_handler_of_somebody_else_is_left_alone() -> None:
    seen: list[int] = []

    def theirs(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(SIGNAL, theirs)
    made = Target()
    try:
        signals.attach(made)
        assert signal.getsignal(SIGNAL) is theirs
        send()
        until(lambda: seen == [SIGNAL])
        signals.detach(made)
        assert signal.getsignal(SIGNAL) is theirs and made.count == 0
    finally:
        signal.signal(SIGNAL, before)


def test_a_handler_set_by_native_code_is_left_alone(tmp_path: object) -> None:
    with open(os.devnull, "w") as nowhere:
        faulthandler.register(SIGNAL, file=nowhere)
        made = Target()
        try:
            installed = signals._action()
            assert installed != 0 and signal.getsignal(SIGNAL) is signal.SIG_DFL  # Python does not know of it
            signals.attach(made)
            assert signals._action() == installed
            signals.detach(made)
            assert signals._action() == installed
        finally:
            faulthandler.unregister(SIGNAL)


def test_a_handler_set_after_ours_is_not_taken_away_at_the_end() -> None:
    made = Target()
    signals.attach(made)
    chained = signal.getsignal(SIGNAL)
    seen: list[int] = []

    def theirs(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        assert callable(chained)
        chained(number, frame)

    try:
        signal.signal(SIGNAL, theirs)
        send()
        assert made.asked.wait(30)
        signals.detach(made)
        assert signal.getsignal(SIGNAL) is theirs
        send()  # theirs calls ours, which has nothing to write to any more
        until(lambda: len(seen) == 2)
        assert made.count == 1
    finally:
        signal.signal(SIGNAL, signal.SIG_DFL)


def test_another_thread_cannot_take_the_signal() -> None:
    made = Target()
    thread = threading.Thread(target=signals.attach, args=(made,))
    thread.start()
    thread.join()
    assert signals._action() == 0
    signals.detach(made)


def test_a_forked_child_has_the_default_action_and_does_not_disturb_its_parent(target: Target) -> None:
    child = os.fork()
    if child == 0:
        if signal.getsignal(SIGNAL) is not signal.SIG_DFL or signal.set_wakeup_fd(-1) != -1:
            os._exit(3)
        os.kill(os.getpid(), SIGNAL)
        os._exit(4)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == SIGNAL
    send()
    assert target.asked.wait(30)
    assert target.count == 1


def test_a_process_without_descriptors_goes_on_without_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket, "socketpair", none_left)
    made = Target()
    with pytest.warns(UserWarning, match="cannot be asked for with SIGUSR1.*Too many open files"):
        signals.attach(made)
    assert signals._action() == 0
    signals.detach(made)
