"""What the engines here share: the pool, tickets, and their ends, each of which is told once."""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from commplane.api import Moved, TransferContext, TransferEngine
from commplane.errors import CommplaneError
from commplane_disagg.engines.pieces import Pieces

__all__ = ["Ends", "PoolEngine", "address_of", "option"]

T = TypeVar("T", bool, int, float, str)


def address_of(pool: memoryview) -> int:
    """Where writable, contiguous memory lies in this process. It must be kept from moving by its owner."""
    return ctypes.addressof(ctypes.c_char.from_buffer(pool))


class Ends:
    """Open tickets, and the ends that nobody has polled yet. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._open: dict[int, str] = {}
        self._ended: deque[Moved] = deque()

    def begin(self, peer: str) -> int:
        """A new ticket."""
        with self._changed:
            ticket = next(self._numbers)
            self._open[ticket] = peer
            return ticket

    def end(self, ticket: int, error: str | None = None) -> bool:
        """The first end of a ticket counts: whether this was it."""
        with self._changed:
            if self._open.pop(ticket, None) is None:
                return False
            self._ended.append(Moved(ticket, error))
            self._changed.notify()
            return True

    def is_open(self, ticket: int) -> bool:
        """Whether it has not ended."""
        with self._changed:
            return ticket in self._open

    def open_of(self, peer: str) -> list[int]:
        """Open tickets of transfers to `peer`, oldest first."""
        with self._changed:
            return [ticket for ticket, whose in self._open.items() if whose == peer]

    def peer_of(self, ticket: int) -> str | None:
        """To whom an open ticket's bytes go."""
        with self._changed:
            return self._open.get(ticket)

    def end_all(self, peer: str, error: str) -> None:
        """End every open ticket of `peer`."""
        for ticket in self.open_of(peer):
            self.end(ticket, error)

    def take(self, timeout: float = 0.0) -> list[Moved]:
        """All ends since the last call; waits up to `timeout` seconds for the first."""
        with self._changed:
            if not self._ended and timeout > 0:
                self._changed.wait_for(lambda: self._ended, timeout)
            out = list(self._ended)
            self._ended.clear()
            return out


def option(context: TransferContext, engine: str, name: str, default: T) -> T:
    """A setting of the type of its default.

    Raises:
        CommplaneError: it is of another type.
    """
    value = context.options.get(name, default)
    kind = type(default)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise CommplaneError(f"option {name} of engine {engine!r}: wanted {kind.__name__}, found {value!r}")
    found: T = kind(value)
    return found


class PoolEngine(TransferEngine):
    """One end with one pool. A subclass says how peers are reached and bytes are moved.

    Attributes:
        name: of the engine.
        options: names of its settings.
    """

    name: ClassVar[str]
    options: ClassVar[Sequence[str]] = ()

    def __init__(self) -> None:
        self._context: TransferContext | None = None
        self._pool: memoryview | None = None
        self._ends = Ends()

    @property
    def context(self) -> TransferContext:
        """What it was opened with.

        Raises:
            CommplaneError: it is not open.
        """
        if self._context is None:
            raise CommplaneError(f"engine {self.name!r} is not open: call open first, and nothing after close")
        return self._context

    @property
    def pool(self) -> memoryview:
        """What was registered.

        Raises:
            CommplaneError: nothing was.
        """
        if self._pool is None:
            raise CommplaneError(f"engine {self.name!r} of {self.context.name!r} has no pool: call register first")
        return self._pool

    def open(self, context: TransferContext) -> None:
        """Check the settings; what a subclass does more comes after."""
        if self._context is not None:
            raise CommplaneError(f"engine {self.name!r} of {self._context.name!r} is open already")
        unknown = sorted(set(context.options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise CommplaneError(f"engine {self.name!r} has no option {', '.join(unknown)}; it has {known}")
        self._context = context

    def register(self, pool: memoryview) -> None:
        """Keep the pool. Once."""
        if self._pool is not None:
            raise CommplaneError(f"engine {self.name!r} of {self.context.name!r} has a pool already: one engine, one pool")
        if pool.readonly or not pool.c_contiguous or not pool.nbytes:
            raise CommplaneError(
                f"pool of {self.context.name!r}: wanted writable contiguous memory, found {pool.nbytes} bytes, readonly "
                f"{pool.readonly}, contiguous {pool.c_contiguous}"
            )
        self._pool = pool.cast("B") if pool.format != "B" or pool.ndim != 1 else pool

    @abstractmethod
    def _remote_pool(self, peer: str) -> int:
        """Bytes of the pool of a connected peer; raises a CommplaneError for any other."""

    @abstractmethod
    def _start(self, peer: str, ticket: int, pieces: Pieces) -> None:
        """Start to move. Whatever goes wrong from here on ends the ticket."""

    def submit(self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int]) -> int:
        """Check everything, then start."""
        pieces = Pieces(peer, local, remote, nbytes, self.pool.nbytes, self._remote_pool(peer))
        ticket = self._ends.begin(peer)
        if pieces.total:
            self._start(peer, ticket, pieces)
        else:
            self._ends.end(ticket)
        return ticket

    def poll(self, timeout: float = 0.0) -> list[Moved]:
        """Ends since the last call."""
        return self._ends.take(timeout)

    def _until(self) -> float:
        """When a wait that begins now has to end, of `time.monotonic`."""
        return time.monotonic() + self.context.timeout
