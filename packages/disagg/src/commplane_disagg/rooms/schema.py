"""What the ranks of a group say to each other about rooms in every step."""

from __future__ import annotations

from commplane.api import SyncField, SyncSpec, Vote

__all__ = ["CAPACITY", "DRAINS", "LANES", "LIFTS", "ROOMS", "TEXT_WORDS"]

CAPACITY = 128
"""Rooms that are agreed upon at a time until they succeed or fail. Further ones go on transferring; the group hears of them when
there is a place."""

LANES = 4
"""Failures whose text is told in one step."""

TEXT_WORDS = 32
"""Integers of one text; seven bytes each."""

DRAINS = 32
"""Failed rooms that are asked in one step whether their pages may be given back, in turns."""

LIFTS = 16
"""Quarantined rooms that are asked about in one step, in turns."""

ROOMS = SyncSpec(
    name="disagg_rooms",
    api=(1, 0),
    fields=(
        SyncField("opened", Vote.MIN),  # how many rooms this rank has ever opened
        SyncField("status", Vote.MIN, CAPACITY),
        SyncField("text", Vote.MAX, LANES * TEXT_WORDS),  # from the rank that failed; zeros from all others
        SyncField("drain", Vote.MIN, DRAINS),
        SyncField("lift", Vote.MIN, LIFTS),
    ),
)
