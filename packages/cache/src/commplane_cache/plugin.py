"""The entry point. Importing it loads neither torch nor any store."""

from __future__ import annotations

from commplane.api import PageStoreSpec, hookimpl
from commplane_cache.stores.specs import STORES


@hookimpl
def commplane_register_page_stores() -> list[PageStoreSpec]:
    """`slab`, and the stores whose libraries are extras of this wheel."""
    return list(STORES)
