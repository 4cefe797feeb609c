"""The page stores of this package. Importing this loads none of them."""

from __future__ import annotations

from commplane.api import PageStoreSpec

__all__ = ["STORES"]

STORES = (
    PageStoreSpec(name="slab", api=(1, 0), factory="commplane_cache.stores.slab:SlabStore", capabilities={"durable", "evicts"}),
)
