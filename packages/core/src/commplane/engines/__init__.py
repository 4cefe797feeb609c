"""What an adapter needs that puts commplane behind the groups of an engine: see docs/engines.md.

`Engine` and `Seam` say what of an engine is hooked or called, and compare that with the engine's source before anything is
touched; `calls` and `lost` say which hooks are in place. `Groups` has all ranks vote on whether the adapter works, and gives the
engine's groups communicators; `Served` is one of them. Importing this loads neither torch nor an engine; `Groups` and `Served`
want torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commplane.engines.hooks import calls, lost
from commplane.engines.seams import Engine, Seam

if TYPE_CHECKING:
    from commplane.engines.groups import Groups, Served

__all__ = ["Engine", "Groups", "Seam", "Served", "calls", "lost"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in ("Groups", "Served"):
        from importlib import import_module

        return getattr(import_module("commplane.engines.groups"), name)
    raise AttributeError(f"module 'commplane.engines' has no attribute {name!r}")
