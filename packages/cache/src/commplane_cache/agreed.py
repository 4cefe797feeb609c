"""What the ranks of a cache agree on in every round: the fields of the spec ``"cache"``.

Everything that a rank may find another way than its peers is in here, and only the agreed values change the tree:

``free``
    min: free pages on the device and on the host. What a rank has beyond that it does not use.
``ended``, ``good``
    min: for copies to the host, copies to the device and writes to storage: how many from the head of the queue have ended, and
    how many of these, before the first failure, went well.
``queued``
    min, one a prefetch: 1 it may end, though it still waits for a slot. There is room for as many as there are slots; where
    more wait, they have their turns.
``pages``
    min, one a prefetch: the hit (-1: no answer yet) while it queries, then pages read without a gap.
``level``
    min, one a prefetch: 0 it goes on here, 1 it may end, 2 its I/O has ended. So all can terminate from 1 on.
``stop``
    max, one a prefetch: 1 it failed here and what all have is kept, 2 the request was aborted. So any terminates.
"""

from __future__ import annotations

from commplane.api import Agreed, SyncField, SyncRound, SyncSpec, Vote
from commplane.errors import ConfigError

__all__ = ["ENDED", "FREE", "GOOD", "LEVEL", "PAGES", "QUEUED", "SLOTS", "STOP", "cache_sync_spec", "check_fields", "vector"]

SLOTS = 16

FREE, ENDED, GOOD, QUEUED, PAGES, LEVEL, STOP = (
    f"cache.{name}" for name in ("free", "ended", "good", "queued", "pages", "level", "stop")
)


def vector(agreed: Agreed, field: str) -> tuple[int, ...]:
    """The agreed values of a field of this spec."""
    values = agreed[field]
    return values if isinstance(values, tuple) else (values,)


def cache_sync_spec(slots: int = SLOTS) -> SyncSpec:
    """The fields for caches with room for `slots` prefetches at a time; equal on all ranks."""
    return SyncSpec(
        name="cache",
        api=(1, 0),
        fields=(
            SyncField("free", Vote.MIN, 2),
            SyncField("ended", Vote.MIN, 3),
            SyncField("good", Vote.MIN, 3),
            SyncField("queued", Vote.MIN, slots),
            SyncField("pages", Vote.MIN, slots),
            SyncField("level", Vote.MIN, slots),
            SyncField("stop", Vote.MAX, slots),
        ),
    )


def check_fields(rounds: SyncRound, slots: int) -> None:
    """Refuse rounds that the first step would fail on. Those of core say what they have; others are believed."""
    found = getattr(rounds, "fields", None)
    wanted = {f"cache.{field.name}": field for field in cache_sync_spec(slots).fields}
    if found is not None and dict(found) != wanted:
        differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise ConfigError(
            f"cache: wanted rounds with the fields of the spec cache alone and {slots} prefetch slots; these differ: "
            f'{", ".join(differ)}; make them with plane.sync_round(..., specs=["cache"]), or specs=[cache_sync_spec({slots})]'
        )
