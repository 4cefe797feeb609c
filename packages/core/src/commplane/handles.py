"""Names for the communicators of this process: strings that a compiled graph can hold, and what they stand for.

A handle is ``PURPOSE/WORLD_SIZE#NUMBER``. The world size is in it because shapes depend on it, so that a graph cached on disk for
another world size is not taken for this one. Numbers count the communicators of one purpose and size in this process and are
never used again, so a graph never reaches another communicator than the one it was compiled for. Ranks that create their
communicators in the same order have the same handles, and so the same graphs.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from commplane.errors import CommunicatorError

__all__ = ["LIVE", "HasHandle", "find", "handle_of", "register"]


class HasHandle(Protocol):
    """A communicator, as far as this module knows one."""

    @property
    def handle(self) -> str:
        """Its name in this process."""
        ...


class _Live(dict[str, Callable[[], Any]]):
    """Handle -> weak reference. An entry goes with its communicator; a closed one that is still held raises by itself."""

    def __missing__(self, handle: str) -> Callable[[], Any]:
        known = ", ".join(sorted(self)) or "none"
        raise CommunicatorError(
            f"wanted the handle of a communicator of this process, found {handle!r} (known: {known}): pass an open communicator, "
            f"and compile again what was compiled for one that is gone"
        )


LIVE = _Live()
"""The communicators of this process; what an operator looks up in each call."""

_numbers: Counter[str] = Counter()
_lock = threading.Lock()


def register(communicator: object, purpose: str, world_size: int) -> str:
    """The handle of a new communicator, which is not kept alive by it. Local."""
    kind = f"{purpose}/{world_size}"
    with _lock:
        _numbers[kind] += 1
        handle = f"{kind}#{_numbers[kind]}"
    LIVE[handle] = weakref.ref(communicator, lambda _gone: LIVE.pop(handle, None))
    return handle


def find(handle: str) -> Any:
    """The communicator of a handle.

    Raises:
        CommunicatorError: there is none in this process, or it was collected.
    """
    return LIVE[handle]() or LIVE.__missing__(handle)


def handle_of(communicator: HasHandle | str) -> str:
    """The handle of a communicator, or the handle itself."""
    return communicator if isinstance(communicator, str) else communicator.handle
