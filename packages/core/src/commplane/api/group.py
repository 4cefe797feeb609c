"""Identity of a process group."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

__all__ = ["GroupKey"]

# Ranks of larger groups are written as stretches.
_SHOWN_SINGLY = 16


@dataclass(frozen=True)
class GroupKey:
    """What workspaces and plans are keyed by: never a role name alone, never a world size.

    Attributes:
        ranks: global ranks in group order; position is the group rank.
        device: device type, ``"cpu"`` or ``"cuda"``.
        purpose: the name given by the caller, such as ``"tp"``.
    """

    ranks: tuple[int, ...]
    device: str
    purpose: str

    @cached_property
    def digest(self) -> str:
        """A short name that is equal on every rank and differs between keys; usable in file names."""
        text = json.dumps([list(self.ranks), self.device, self.purpose])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """The ranks as stretches of consecutive ones, first and last of each: a thousand ranks are mostly few of them."""
        out: list[tuple[int, int]] = []
        for r in self.ranks:
            if out and out[-1][1] == r - 1:
                out[-1] = out[-1][0], r
            else:
                out.append((r, r))
        return out

    @cached_property
    def _text(self) -> str:
        shown = ", ".join(map(str, self.ranks))
        if len(self.ranks) > _SHOWN_SINGLY:
            shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in self.runs)
        return f"{self.purpose!r} over [{shown}] on {self.device}"

    def __str__(self) -> str:
        return self._text
