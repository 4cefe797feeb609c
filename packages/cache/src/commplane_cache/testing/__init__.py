"""For tests of caches: a store whose delays, failures and losses are drawn from a seed."""

from __future__ import annotations

from commplane_cache.testing.seeded_store import SeededStore

__all__ = ["SeededStore"]
