"""Page stores: `slab` is embedded, the others are extras. Each module is imported when its store is opened."""

from __future__ import annotations
