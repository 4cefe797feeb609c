"""Things that are asked about a few at a time, each in its turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Generic, TypeVar

__all__ = ["Turns"]

_T = TypeVar("_T")


class Turns(Generic[_T]):
    """A queue that goes round. Who does the same calls has the same ones in turn. Iterates in the order in which they were added.

    Args:
        width: how many are asked about at a time.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._number = count()
        self._queue: deque[tuple[int, _T]] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[_T]:
        return (what for _, what in sorted(self._queue, key=lambda pair: pair[0]))

    def append(self, what: _T) -> None:
        """Ask about this, too."""
        self._queue.append((next(self._number), what))

    def window(self) -> list[_T]:
        """Whose turn it is."""
        return [what for _, what in islice(self._queue, self._width)]

    def turn(self, over: Sequence[_T]) -> None:
        """Those whose turn it was have answered; of them, these are asked about no more."""
        for _ in range(min(len(self._queue), self._width)):
            pair = self._queue.popleft()
            if not any(pair[1] is what for what in over):
                self._queue.append(pair)
