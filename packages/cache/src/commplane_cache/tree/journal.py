"""The digest of a rank's state, and the last decisions.

Everything that changes the tree, its pages, locks, victims or prefetches is noted, in order. Equal digests mean that the ranks
took the same decisions in the same order; a difference never goes away again, because each step is a bijection of the digest.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Decision", "Journal"]

_MASK = (1 << 63) - 1
# Odd, so that a difference is never multiplied away; fixed numbers, so that ranks of any Python agree.
_STEP, _A, _B, _C = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5


@dataclass(frozen=True)
class Decision:
    """One change.

    Attributes:
        number: counts the decisions, from 1; decisions of one number are the same on all ranks.
        step: in which round's wake it was taken.
        what: what was decided.
        numbers: of what, mostly the number of the node or the prefetch, and pages.
    """

    number: int
    step: int
    what: str
    numbers: tuple[int, int, int]


class Journal:
    """Notes of one rank.

    Attributes:
        digest: of everything noted so far, below 2**63.
        step: sync rounds applied so far.
        count: decisions so far.
        listener: called with every decision, or None.

    Args:
        keep: how many of the last decisions are kept.
        tell: called with each decision's kind and numbers: `SyncRound.note`, for the flight records.
    """

    __slots__ = ("_codes", "_ring", "_tell", "count", "digest", "listener", "step")

    def __init__(self, keep: int, tell: Callable[[str, int, int, int], None] | None = None) -> None:
        self.digest = 1
        self.step = self.count = 0
        self.listener: Callable[[Decision], None] | None = None
        self._ring: deque[tuple[int, str, int, int, int]] = deque(maxlen=keep)
        self._codes: dict[str, int] = {}
        self._tell = tell

    def mix(self, a: int, b: int = 0, c: int = 0) -> None:
        """Note numbers in the digest alone: what happens too often for the list of decisions."""
        self.digest = (self.digest * _STEP + a * _A + b * _B + c * _C + 1) & _MASK

    def note(self, what: str, a: int, b: int = 0, c: int = 0) -> None:
        """Note a decision."""
        code = self._codes.get(what)
        if code is None:  # from the text itself: the order in which kinds first occur does not matter
            code = self._codes[what] = zlib.crc32(what.encode()) << 24
        self.digest = (self.digest * _STEP + (a ^ code) * _A + b * _B + c * _C) & _MASK
        self.count += 1
        self._ring.append((self.step, what, a, b, c))
        if self._tell is not None:
            self._tell(what, a, b, c)
        if self.listener is not None:
            self.listener(Decision(self.count, self.step, what, (a, b, c)))

    def decisions(self) -> list[Decision]:
        """The last decisions, oldest first; equal on all ranks up to the last common round."""
        first = self.count - len(self._ring) + 1
        return [Decision(i, step, what, (a, b, c)) for i, (step, what, a, b, c) in enumerate(self._ring, first)]
