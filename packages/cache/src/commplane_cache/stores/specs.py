"""The page stores of this package. Importing this loads none of them."""

from __future__ import annotations

from commplane.api import PageStoreSpec

__all__ = ["STORES"]

_AT = "commplane_cache.stores"
STORES = (
    PageStoreSpec(name="slab", api=(1, 0), factory=f"{_AT}.slab:SlabStore", capabilities={"durable", "evicts"}),
    PageStoreSpec(name="lmdb", api=(1, 0), factory=f"{_AT}.lmdb:LmdbStore", capabilities={"durable", "shared"}),
    PageStoreSpec(name="redis", api=(1, 0), factory=f"{_AT}.redis:RedisStore", capabilities={"durable", "shared"}),
    PageStoreSpec(name="fsspec", api=(1, 0), factory=f"{_AT}.fsspec:FsspecStore", capabilities={"durable", "shared"}),
    # Its pages live in the memory of the processes that are connected.
    PageStoreSpec(name="mooncake", api=(1, 0), factory=f"{_AT}.mooncake:MooncakeStore", capabilities={"shared"}),
)
