"""The entry point. Importing it loads neither torch nor any engine."""

from __future__ import annotations

from commplane.api import TransferSpec, hookimpl
from commplane_disagg.engines.specs import SPECS


@hookimpl
def commplane_register_transfer_engines() -> list[TransferSpec]:
    """The engines ``shm``, ``tcp``, ``nixl`` and ``mooncake``; each is imported when it is opened."""
    return list(SPECS)
