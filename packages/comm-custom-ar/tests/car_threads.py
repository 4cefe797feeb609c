"""`custom_ar` through the public API with threads as ranks: fast, many cases in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from commplane.runtime import Plane
from commplane.testing import PluginHost, run_threads
from commplane_custom_ar import plugin

T = TypeVar("T")

# Pages instead of the default 64 KiB: a message of a few pages then takes several steps.
SMALL_CHUNKS = {"chunk_bytes": 4096}


def host(_rank: int = 0) -> PluginHost:
    """This wheel's plugin and core's own, nothing else that is installed."""
    out = PluginHost()
    out.register(plugin, "custom_ar", dist="commplane-custom-ar", version="0.1.0")
    return out


def run(world_size: int, function: Callable[[Plane], T], **options: Any) -> list[T]:
    """`function(plane)` on every rank; `options` are settings of custom_ar. Raises what the first rank raised."""
    settings = {"timeout": 60, "custom_ar": {**SMALL_CHUNKS, **options}}
    out = run_threads(world_size, function, plugins=host, config=lambda _rank: settings, timeout=150)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out  # type: ignore[return-value]
