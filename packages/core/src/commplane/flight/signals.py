"""SIGUSR1: dump the flight records of this process, also while its main thread is inside native code.

Python runs a handler in the main thread, between two of its instructions: not while that thread sits in a wait of Gloo, which is
when the records are wanted most. So there are two ways. The wakeup file descriptor, if nobody has it, gets a byte from the C
handler at once, and a thread that reads it dumps. The Python handler sends a byte to the same thread: for when an event loop has
taken the descriptor, and late but not never.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import weakref
from typing import Protocol

from commplane.notice import notice

__all__ = ["SIGNAL", "Dumpable", "attach", "detach"]

SIGNAL = signal.SIGUSR1

_BY_C = bytes([SIGNAL])  # what Python's C handler writes
_BY_PYTHON = b"\0"  # no signal has this number


class Dumpable(Protocol):
    """What is dumped on the signal."""

    def dump_on_signal(self) -> None:
        """Called in a thread of its own; does not raise."""


_targets: weakref.WeakSet[Dumpable] = weakref.WeakSet()
_watch: _Watch | None = None
_lock = threading.Lock()


def attach(target: Dumpable) -> None:
    """Dump `target` on the signal from now on. Local.

    The signal is taken only if its action is still the default one and this is the main thread, where Python allows it;
    otherwise it stays what it is.
    """
    global _watch
    with _lock:
        _targets.add(target)
        if _watch is not None or threading.current_thread() is not threading.main_thread() or _action() != 0:
            return
        try:
            _watch = _Watch()
        except OSError as error:  # no descriptor left: a run does not fail for want of its recorder
            notice(f"flight records cannot be asked for with {SIGNAL.name}: {error}")


def detach(target: Dumpable) -> None:
    """Not any more. After the last one, in the main thread, the signal gets its default action back. Local."""
    global _watch
    with _lock:
        _targets.discard(target)
        if not _targets and _watch is not None and threading.current_thread() is threading.main_thread():
            _watch.stop()
            _watch = None


def _action() -> int:
    """Address of the C handler of the signal, 0 for the default one. Python's own table misses handlers set by native code."""
    found = ctypes.create_string_buffer(1024)  # a struct sigaction, whose first member it is
    if ctypes.CDLL(None, use_errno=True).sigaction(int(SIGNAL), None, found) != 0:
        raise OSError(ctypes.get_errno(), "sigaction")
    return int.from_bytes(found.raw[: ctypes.sizeof(ctypes.c_void_p)], sys.byteorder)


class _Watch:
    """The handler, the socket pair and the thread that reads it. Made and stopped in the main thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        threading.Thread(target=self._read, name=f"commplane {SIGNAL.name}", daemon=True).start()
        self._handler = self._handle  # one object, so that it can be told from another handler
        signal.signal(SIGNAL, self._handler)
        signal.siginterrupt(SIGNAL, False)  # what native code waits in goes on, where the kernel can do that
        self._installed = _action()
        holder = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if holder != -1:
            signal.set_wakeup_fd(holder)

    def _handle(self, _number: int, _frame: object) -> None:
        try:
            self._writer.send(_BY_PYTHON)
        except OSError:  # full, so that the thread is about to read; or stopped, and called by a handler that was set after us
            return

    def _read(self) -> None:
        answered = False  # a dump for which the Python handler has yet to run
        while received := self._reader.recv(4096):
            by_c, by_python = _BY_C in received, _BY_PYTHON in received
            if by_c or (by_python and not answered):
                with _lock:
                    targets = list(_targets)
                for target in targets:
                    target.dump_on_signal()
            answered = (answered or by_c) and not by_python
        self._reader.close()

    def stop(self) -> None:
        """Put back what was there, unless somebody has taken the signal or the descriptor since."""
        if signal.getsignal(SIGNAL) is self._handler and _action() == self._installed:
            signal.signal(SIGNAL, signal.SIG_DFL)
        holder = signal.set_wakeup_fd(-1)
        if holder not in (-1, self._writer.fileno()):
            signal.set_wakeup_fd(holder)
        self._writer.shutdown(socket.SHUT_RDWR)  # also where a child holds a copy, and the end of the thread
        self._writer.close()

    def forget(self) -> None:
        """In a forked child: a byte on this socket would wake the parent's thread."""
        if signal.getsignal(SIGNAL) is self._handler and _action() == self._installed:
            signal.signal(SIGNAL, signal.SIG_DFL)
        holder = signal.set_wakeup_fd(-1)
        if holder not in (-1, self._writer.fileno()):
            signal.set_wakeup_fd(holder)
        self._reader.close()
        self._writer.close()


def _after_fork() -> None:
    global _watch, _lock
    _lock = threading.Lock()  # the one of the parent may be held by a thread that is not here
    _targets.clear()
    if _watch is not None:
        _watch.forget()
        _watch = None


os.register_at_fork(after_in_child=_after_fork)
