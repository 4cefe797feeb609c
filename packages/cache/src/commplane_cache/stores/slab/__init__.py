"""The embedded store: a file of fixed-size slots and a log that says what is in them."""

from __future__ import annotations

from commplane_cache.stores.slab.store import SlabStore

__all__ = ["SlabStore"]
