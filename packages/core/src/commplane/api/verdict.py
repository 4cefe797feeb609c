"""What a probe answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Unusable", "Usable", "Verdict"]


@dataclass(frozen=True)
class Usable:
    """The backend can serve this group as far as this rank can tell; `facts` are shown by ``commplane doctor``."""

    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Unusable:
    """The backend cannot serve this group; `reason` is shown on every rank."""

    reason: str


Verdict = Usable | Unusable
