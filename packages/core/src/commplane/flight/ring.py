"""The last calls of a backend that keeps no records of its own, written down around each call.

This runs once per collective, so it is written for speed: rows are allocated once and written over, the number of a call is not
stored but follows from where its row lies, and names are put together only when somebody reads. What is left, about 0.2 us, is
two clock reads, the size of the tensor, and one Python call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import length_hint
from time import monotonic
from typing import Any, Protocol

from commplane.api import Collective, CommBackend, FlightRecord, ReduceOp
from commplane.errors import UnsupportedOperation

__all__ = ["Bindable", "FlightRing", "Label", "bindable"]

Call = Callable[..., Any]
Label = tuple[str, "str | None", "str | None"]
"""Collective, op and dtype of a call."""

# A row is [label, bytes, start, end], times in seconds. Literal indices below: a name would be looked up for each.
# No start: the row is being written. The end is None while the call runs, else a time, or one of the two classes below.
_Row = list[Any]

# How often a copy is tried again because a call came in between; one try takes some 30 us, and hardly any fails.
_TRIES = 1000


class _Refused:
    """In place of the end of a call that was refused before anything was sent: it has no number."""


class _Failed:
    """In place of the end of a call that raised. The exception itself would keep its frames, and their tensors, alive."""

    __slots__ = ("at", "text")

    def __init__(self, at: float, error: BaseException) -> None:
        self.at = at
        self.text = f"{type(error).__name__}: {error}"


class FlightRing:
    """The last `length` calls, 2 at least, of one backend in one communicator, on one rank.

    Calls come from one thread at a time; `records` may be called from any thread at any time. No tensor is kept.

    Attributes:
        wrap: ``wrap(call, label)`` gives a callable that writes down each call; `wrap_one` the same, a little cheaper, for a
            call whose one argument is a tensor.
        taken: how many rows were taken so far, and twice how many of those for a call that was refused.
    """

    def __init__(self, length: int) -> None:
        rows: list[_Row] = [[None, 0, None, None] for _ in range(max(length, 2))]
        place = iter(rows)
        take = place.__next__
        laps = refusals = 0  # refusals count twice: odd while one is being noted

        def lap() -> _Row:
            nonlocal place, take, laps
            place = iter(rows)
            take = place.__next__
            laps += 1
            return take()

        def failed(row: _Row, error: BaseException, args: tuple[Any, ...]) -> None:
            nonlocal refusals
            # The same two that do not poison a communicator: nothing was sent, and the other ranks count no call.
            if isinstance(error, UnsupportedOperation) or (args and str(args[0].layout) != "torch.strided"):
                refusals += 1
                row[3] = _Refused
                refusals += 1
            else:
                row[3] = _Failed(monotonic(), error)

        def wrap_one(call: Call, label: Label) -> Call:
            def recorded(tensor: Any) -> Any:
                nbytes = tensor.nbytes
                try:
                    row = take()
                except StopIteration:
                    row = lap()
                row[2] = None
                row[0] = label
                row[1] = nbytes
                row[3] = None
                row[2] = monotonic()
                try:
                    out = call(tensor)
                except BaseException as error:
                    failed(row, error, (tensor,))
                    raise
                row[3] = monotonic()
                return out

            return recorded

        def wrap(call: Call, label: Label) -> Call:
            def recorded(*args: Any) -> Any:
                nbytes = args[0].nbytes if args else 0
                try:
                    row = take()
                except StopIteration:
                    row = lap()
                row[2] = None
                row[0] = label
                row[1] = nbytes
                row[3] = None
                row[2] = monotonic()
                try:
                    out = call(*args)
                except BaseException as error:
                    failed(row, error, args)
                    raise
                row[3] = monotonic()
                return out

            return recorded

        self.wrap: Callable[[Call, Label], Call] = wrap
        self.wrap_one: Callable[[Call, Label], Call] = wrap_one
        self.taken: Callable[[], tuple[int, int]] = lambda: ((laps + 1) * len(rows) - length_hint(place), refusals)
        self._rows = rows

    def records(self) -> list[FlightRecord]:
        """The calls that are still held, oldest first. Local, from any thread."""
        for _ in range(_TRIES):
            before = self.taken()
            rows = list(map(list.copy, self._rows))  # one C call, during which Python runs nothing else
            if self.taken() == before and before[1] % 2 == 0:
                break
        else:
            raise RuntimeError("the flight ring was never at rest while it was copied: try again")
        taken, refused = before[0], before[1] // 2
        at = taken % len(rows)
        ordered = (rows[at:] + rows[:at])[len(rows) - min(taken, len(rows)) :]
        if len(ordered) > 1 and _is_stale(*ordered[-2:]):
            ordered[-1][2] = None
        number, out = taken - refused, []
        for label, nbytes, started, ended in reversed(ordered):
            if ended is _Refused and started is not None:
                continue
            if started is not None:
                out.append(_record(number, label, nbytes, started, ended))
            number -= 1
        return out[::-1]


def _is_stale(before: _Row, last: _Row) -> bool:
    """Whether the last row was taken and still holds the call of a lap ago, which began before the call before it."""
    return last[2] is not None and before[2] is not None and last[2] <= before[2]


def _record(number: int, label: Label, nbytes: int, started: float, ended: Any) -> FlightRecord:
    failed = isinstance(ended, _Failed)
    end = ended.at if failed else ended
    return FlightRecord(
        seq=number,
        collective=label[0],
        op=label[1],
        dtype=label[2],
        nbytes=nbytes,
        state="failed" if failed else "running" if ended is None else "done",
        started_ns=round(started * 1e9),
        finished_ns=None if end is None else round(end * 1e9),
        detail=ended.text if failed else "",
    )


class Bindable(Protocol):
    """What a dispatch table needs of a backend."""

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: Any, *, in_place: bool) -> Call:
        """`CommBackend.bind`."""


class _Recorded:
    """A backend whose bound calls leave a record."""

    def __init__(self, backend: CommBackend, ring: FlightRing) -> None:
        self._backend = backend
        self._ring = ring

    def bind(self, collective: Collective, op: ReduceOp | None, dtype: Any, *, in_place: bool) -> Call:
        call = self._backend.bind(collective, op, dtype, in_place=in_place)
        label = (str(collective), None if op is None else str(op), None if dtype is None else str(dtype).removeprefix("torch."))
        if collective in (Collective.ALL_REDUCE, Collective.ALL_GATHER, Collective.REDUCE_SCATTER):
            return self._ring.wrap_one(call, label)
        return self._ring.wrap(call, label)


def bindable(backends: Mapping[str, CommBackend], rings: Mapping[str, FlightRing]) -> dict[str, Bindable]:
    """`backends`, those with a ring wrapped so that what they bind leaves records in it. The others gain nothing per call."""
    return {name: _Recorded(b, rings[name]) if name in rings else b for name, b in backends.items()}
