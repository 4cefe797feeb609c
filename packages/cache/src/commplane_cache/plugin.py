"""The entry point. Importing it loads neither torch nor any store."""

from __future__ import annotations

from commplane.api import PageStoreSpec, SyncSpec, hookimpl
from commplane_cache.agreed import cache_sync_spec
from commplane_cache.stores.specs import STORES


@hookimpl
def commplane_register_page_stores() -> list[PageStoreSpec]:
    """`slab`, and the stores whose libraries are extras of this wheel."""
    return list(STORES)


@hookimpl
def commplane_register_cache_sync() -> list[SyncSpec]:
    """``cache``: what the ranks of a `commplane_cache.cache.PrefixCache` agree on in every round."""
    return [cache_sync_spec()]
