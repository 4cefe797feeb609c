"""Identity of a process group."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

__all__ = ["GroupKey"]


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

    @property
    def digest(self) -> str:
        """A short name that is equal on every rank and differs between keys; usable in file names."""
        text = json.dumps([list(self.ranks), self.device, self.purpose])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.purpose!r} over {list(self.ranks)} on {self.device}"
