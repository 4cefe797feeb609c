"""Settings of a cache. Equal on all ranks, but for `CacheOptions.writer` and `CacheOptions.decisions`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

from commplane.errors import ConfigError
from commplane_cache.agreed import SLOTS
from commplane_cache.evict import POLICIES as EVICT
from commplane_cache.prefetch import POLICIES as PREFETCH

__all__ = ["WRITES", "CacheOptions"]

WRITES = ("write_through", "write_through_selective", "write_back")

_COUNTS = ("page_tokens", "selective_hits", "prefetch_least_pages", "prefetch_batch_pages")


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Settings of a `PrefixCache`.

    Attributes:
        page_tokens: tokens in a page.
        evict: which pages go first: ``lru``, ``lfu`` or ``priority``.
        write: when pages are copied to the host, and from there to storage: ``write_through`` at once,
            ``write_through_selective`` when they were used `selective_hits` times, ``write_back`` when they leave the device.
        selective_hits: uses, the first included.
        prefetch: when a request stops waiting for its pages from storage: ``best_effort``, ``wait_complete`` or ``timeout``.
        prefetch_least_pages: fewer are not worth a prefetch.
        prefetch_batch_pages: read in one go; between two a prefetch can stop.
        prefetch_slots: prefetches at a time, at least two; the number in the round's spec.
        timeout_base, timeout_per_1024_tokens, timeout_most: seconds of the policy ``timeout``, from when a request is wanted.
        pipelined: `step` reads the round that the step before has issued: nobody waits, and what is agreed comes a step later.
        writer: whether this rank writes to storage. Where several ranks hold the same bytes, one of them.
        decisions: how many of the last decisions are kept.
    """

    page_tokens: int = 16
    evict: str = "lru"
    write: str = "write_through"
    selective_hits: int = 2
    prefetch: str = "timeout"
    prefetch_least_pages: int = 1
    prefetch_batch_pages: int = 128
    prefetch_slots: int = SLOTS
    timeout_base: float = 1.0
    timeout_per_1024_tokens: float = 0.25
    timeout_most: float = 30.0
    pipelined: bool = False
    writer: bool = True
    decisions: int = 1024

    def digest(self) -> int:
        """Of everything that must be equal on all ranks."""
        return zlib.crc32(repr(replace(self, writer=True, decisions=0)).encode())

    def __post_init__(self) -> None:
        for what, value, known in (
            ("write policy", self.write, WRITES),
            ("eviction policy", self.evict, tuple(EVICT)),
            ("prefetch policy", self.prefetch, PREFETCH),
        ):
            if value not in known:
                raise ConfigError(f"cache: wanted a {what} of {', '.join(known)}, found {value!r}")
        # Two slots, because a field of a round with one number is no vector.
        for what, least in (*((name, 1) for name in _COUNTS), ("prefetch_slots", 2)):
            if getattr(self, what) < least:
                raise ConfigError(f"cache: wanted {what} of at least {least}, found {getattr(self, what)}")
