"""The last changes of a table, by number. Pure: no clock, no I/O."""

from __future__ import annotations

from collections import deque

from commplane_disagg.wire import Change

__all__ = ["Feed"]


class Feed:
    """Numbers changes from `since` + 1 on and keeps the last `keep` of them."""

    def __init__(self, keep: int = 4096, since: int = 0) -> None:
        self.sequence = since
        self._kept: deque[Change] = deque(maxlen=keep)

    def add(self, change: Change) -> None:
        """Append a change that was numbered ``sequence + 1``."""
        if change.sequence != self.sequence + 1:
            raise ValueError(f"a feed wants change {self.sequence + 1}, found {change.sequence}")
        self.sequence = change.sequence
        self._kept.append(change)

    def since(self, number: int) -> tuple[bool, tuple[Change, ...]]:
        """Whether some after `number` are lost, and else all after it. A number from the future is of another start: lost."""
        if number > self.sequence or number < self.sequence - len(self._kept):
            return True, ()
        late = self.sequence - number
        return False, tuple(self._kept[i] for i in range(len(self._kept) - late, len(self._kept)))
