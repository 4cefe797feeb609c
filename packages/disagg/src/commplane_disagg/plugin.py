"""The entry point. Importing it loads neither torch nor any engine."""

from __future__ import annotations

from commplane.api import SyncSpec, TransferSpec, hookimpl
from commplane_disagg.engines.specs import SPECS
from commplane_disagg.rooms.schema import ROOMS


@hookimpl
def commplane_register_transfer_engines() -> list[TransferSpec]:
    """The engines ``shm``, ``tcp``, ``nixl`` and ``mooncake``; each is imported when it is opened."""
    return list(SPECS)


@hookimpl
def commplane_register_cache_sync() -> list[SyncSpec]:
    """``disagg_rooms``: what the ranks of a replica agree on in each step of their rooms."""
    return [ROOMS]
