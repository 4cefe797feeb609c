"""commplane: communication backends as plugins, on which all ranks of a process group agree.

Importing this loads neither torch nor any plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commplane import errors
from commplane.api.markers import hookimpl
from commplane.errors import CommplaneError

if TYPE_CHECKING:
    from commplane.config import Config
    from commplane.runtime import Communicator, Plane, init

__all__ = ["CommplaneError", "Communicator", "Config", "Plane", "__version__", "errors", "hookimpl", "init"]

_LAZY = {"init": "runtime", "Plane": "runtime", "Communicator": "runtime", "Config": "config"}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib_metadata import version

        return version("commplane")
    if name in _LAZY:
        return getattr(importlib.import_module(f"commplane.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'commplane' has no attribute {name!r}")
