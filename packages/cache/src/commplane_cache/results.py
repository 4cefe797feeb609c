"""What the calls of a cache answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from commplane_cache.tree import Node, TokenRun

__all__ = ["Drained", "Inserted", "Match"]


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """What the cache has of a run. Good until the next step, or for as long as `device_node` or `node` is locked.

    Attributes:
        run: what was looked up.
        pages: numbers of the device pages from the first page on.
        host: pages after these that are on the host, see `PrefixCache.load_back`.
        device_node: where the device pages end.
        node: where all of it ends.
        path: nodes of all of it.
    """

    run: TokenRun
    pages: np.ndarray
    host: int
    device_node: Node
    node: Node
    path: tuple[Node, ...]

    @property
    def device(self) -> int:
        """Pages on the device."""
        return len(self.pages)

    @property
    def known(self) -> int:
        """Pages on device and host."""
        return len(self.pages) + self.host


@dataclass(frozen=True, slots=True, eq=False)
class Inserted:
    """What became of pages that were given to the tree.

    Attributes:
        node: where the run ends in the tree; lock it while the request runs on.
        pages: device pages that the tree has for them. The request uses these from now on: its own, where the tree had pages
            already, are free.
    """

    node: Node
    pages: np.ndarray


@dataclass(frozen=True, slots=True)
class Drained:
    """How much the last round drained from each queue: nodes whose copy or write has ended on all ranks."""

    writes: int = 0
    loads: int = 0
    puts: int = 0
