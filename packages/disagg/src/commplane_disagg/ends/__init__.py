"""What an engine calls: a `PrefillEnd` on each prefill rank, a `DecodeEnd` on each decode rank."""

from __future__ import annotations

from commplane_disagg.ends.decode import Address, DecodeEnd, PrefillReplica
from commplane_disagg.ends.layout import KvLayout
from commplane_disagg.ends.prefill import PrefillEnd
from commplane_disagg.ends.report import LentPages, Report, RoomResult
from commplane_disagg.ends.rows import grid_of, kv_of, replica_of, row_of

__all__ = [
    "Address",
    "DecodeEnd",
    "KvLayout",
    "LentPages",
    "PrefillEnd",
    "PrefillReplica",
    "Report",
    "RoomResult",
    "grid_of",
    "kv_of",
    "replica_of",
    "row_of",
]
