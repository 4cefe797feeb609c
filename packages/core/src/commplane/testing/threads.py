"""Threads as ranks: one process, no network, for tests in volume."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from commplane.plugins import PluginHost
from commplane.runtime import Plane, init

__all__ = ["run_threads"]

T = TypeVar("T")


def run_threads(
    world_size: int,
    function: Callable[[Plane], T],
    *,
    plugins: Callable[[int], PluginHost] = lambda _rank: PluginHost(),
    config: Callable[[int], Mapping[str, Any]] = lambda _rank: {},
    timeout: float = 60.0,
) -> list[T | Exception]:
    """Call ``function(plane)`` on `world_size` ranks over an in-process store; each rank's result or exception, by rank.

    Args:
        world_size: number of ranks.
        function: what a rank does; its plane is closed afterwards.
        plugins: the plugin host of a rank; by default only core's own plugin, nothing that is installed.
        config: settings of a rank.
        timeout: seconds that all of it may take.
    """
    from torch.distributed import HashStore

    store = HashStore()
    results: list[Any] = [TimeoutError(f"rank {r} had not finished after {timeout:g} s") for r in range(world_size)]

    def rank_main(rank: int) -> None:
        try:
            host = plugins(rank)
            with init(store=store, rank=rank, world_size=world_size, plugins=host, config=config(rank)) as plane:
                results[rank] = function(plane)
        except Exception as error:  # a test looks at what each rank raised
            results[rank] = error

    threads = [threading.Thread(target=rank_main, args=(r,), name=f"rank {r}", daemon=True) for r in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    return results
