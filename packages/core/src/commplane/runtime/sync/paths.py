"""How the rows of all ranks come together: alone, over one communicator, or host by host; `slots` has one more way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from commplane.runtime.communicator import Communicator

__all__ = ["Alone", "HostByHost", "OneGroup", "Path", "Threadless"]


class Path(Protocol):
    """Where a rank's row goes, and where those of all come from.

    Attributes:
        buffer: what `Schema.pack_into` writes this rank's row to.
        communicators: the round's own.
        names_who_is_missing: whether `exchange` ends by the deadline of its communicator, however the ranks come to it, and
            what it raises names the missing ranks of the whole group, wherever they are.
    """

    buffer: Any
    communicators: Sequence[Communicator]
    names_who_is_missing: bool

    def exchange(self) -> Any:
        """The rows of all ranks in group order, an int64 array that the caller may change. Collective."""


@runtime_checkable
class Threadless(Path, Protocol):
    """A path whose exchange comes in two halves, of which the first does not wait: such a round needs no thread."""

    def send(self) -> None:
        """Send this rank's row. Local."""

    def collect(self) -> Any:
        """The rows of all, as from `exchange`. Collective; may be called again if it was interrupted."""

    def leave(self) -> None:
        """Tell the others that nothing more is sent. Local, idempotent."""

    def forget(self) -> None:
        """Give up what belongs to the parent, in a forked child. Local, idempotent."""

    def close(self) -> None:
        """Leave and release. Local, idempotent."""


def _row(rows: int, columns: int) -> tuple[Any, Any]:
    """An array and a tensor in one memory."""
    import numpy as np
    import torch

    array = np.zeros((rows, columns), dtype=np.int64)
    return array, torch.from_numpy(array)


class Alone:
    """A group of one: nothing is sent."""

    communicators: Sequence[Communicator] = ()
    names_who_is_missing = True

    def __init__(self, columns: int) -> None:
        import numpy as np

        self._row = np.zeros((1, columns), dtype=np.int64)
        self.buffer: Any = self._row.data

    def exchange(self) -> Any:
        """The row itself."""
        return self._row


class OneGroup:
    """One all-gather. What its plan runs decides how: through shared memory where it may, else torch."""

    def __init__(self, columns: int, communicator: Communicator) -> None:
        self.communicators: Sequence[Communicator] = (communicator,)
        # Gloo knows that a connection is late, and not whose fault it is.
        self.names_who_is_missing = communicator.plan.backends[0] != "torch"
        self._communicator = communicator
        row, self._row = _row(1, columns)
        self.buffer: Any = row.data

    def exchange(self) -> Any:
        """One all-gather."""
        return self._communicator.all_gather(self._row).numpy()


class HostByHost:
    """Gathered on each host by its first rank, between the first ranks of the hosts, then spread on each host.

    A message between hosts for each host instead of each rank; where a host has one rank only its two steps are left out.

    Args:
        columns: of a row.
        hosts: group ranks of each host; equal on all ranks.
        on_host: over the ranks of this host, or None where this rank is alone on it.
        between: over the first ranks of the hosts, or None where this rank is not one.
    """

    names_who_is_missing = False

    def __init__(
        self,
        columns: int,
        hosts: Sequence[Sequence[int]],
        on_host: Communicator | None,
        between: Communicator | None,
    ) -> None:
        import numpy as np

        self.communicators: Sequence[Communicator] = [c for c in (on_host, between) if c is not None]
        self._on_host, self._between = on_host, between
        # Blocks of one size travel between hosts: that of the host with most ranks.
        largest = max(map(len, hosts))
        row, self._row = _row(1, columns)
        self.buffer: Any = row.data
        _, self._block = _row(largest, columns)
        _, self._all = _row(largest * len(hosts), columns)
        at = {rank: h * largest + i for h, host in enumerate(hosts) for i, rank in enumerate(host)}
        self._order = np.array([at[rank] for rank in range(len(at))])

    def exchange(self) -> Any:
        """Gather, gather, broadcast."""
        rows = self._row if self._on_host is None else self._on_host.all_gather(self._row)
        every = self._all
        if self._between is not None:
            self._block[: rows.shape[0]] = rows
            every = self._between.all_gather(self._block)
        if self._on_host is not None:
            every = self._on_host.broadcast(every, src=0)
        return every.numpy()[self._order]
