"""The radix tree over pages of tokens: which prefixes are known, and where their pages lie.

`run` is a request's tokens, `node` a run of pages with one parent, `radix` the tree, `journal` the digest of what changed it.
"""

from __future__ import annotations

from commplane_cache.tree.journal import Journal
from commplane_cache.tree.node import Node
from commplane_cache.tree.radix import RadixTree
from commplane_cache.tree.run import TokenRun

__all__ = ["Journal", "Node", "RadixTree", "TokenRun"]
