"""The structure of the tree: walk, split, graft, remove, lock. Pages are moved by others.

Runs are compared as bytes, a node at a time: one memcmp where all of a node matches, numpy to find the place where it does not.
Deterministic: nodes are numbered in the order of creation, and nothing depends on addresses or hash order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from commplane.errors import CommplaneError
from commplane_cache.tree.journal import Journal
from commplane_cache.tree.node import Node
from commplane_cache.tree.run import TokenRun

__all__ = ["RadixTree"]


class RadixTree:
    """A radix tree over pages. Local; equal on all ranks because all call alike, which `journal` proves.

    Attributes:
        root: has no pages, is never removed.
        size: nodes, without the root.
        clock: logical time: one more with every use of the tree.
        locked: pages on the device, ready, of nodes that are locked.
        on_split: told of the new upper part of a node.
    """

    def __init__(self, page_tokens: int, journal: Journal, *, names: bool) -> None:
        self.page_tokens = page_tokens
        self.root = Node(0, None, b"", b"", 0)
        self.size = self.clock = self.locked = 0
        self._journal = journal
        self._names = names
        self._next = 1
        self.on_split: Callable[[Node], None] | None = None

    def peek(self, run: TokenRun) -> int:
        """Pages of `run` that the tree knows, on any tier. Changes nothing."""
        node, place, data = self.root, 0, run.data
        step, edge = run.page_bytes, run.salt + run.data[: run.page_bytes]
        if not run.pages:  # else a short page after one salt could look like a page after another
            return 0
        while (child := node.children.get(edge)) is not None:
            if not data.startswith(child.key, place):
                return place // step + _common(data, place, child.key, step)
            node, place = child, place + len(child.key)
            edge = data[place : place + step]
        return place // step

    def walk(self, run: TokenRun, limit: int | None = None) -> tuple[list[Node], int]:
        """Nodes along `run`, root not among them, and how many pages they have together; splits where the run leaves a node.

        Args:
            run: what to follow.
            limit: pages after which to stop; all if unset.
        """
        step = run.page_bytes
        data = run.data if limit is None else run.data[: limit * step]
        node, place = self.root, 0
        path: list[Node] = []
        edge = run.salt + data[:step]
        if len(data) < step:
            return path, 0
        while (child := node.children.get(edge)) is not None:
            if not data.startswith(child.key, place):
                common = _common(data, place, child.key, step)
                if common:  # 0 only where a page is cut off by `limit`
                    path.append(self.split(child, common))
                    place += common * step
                break
            path.append(child)
            node, place = child, place + len(child.key)
            edge = data[place : place + step]
        return path, place // step

    def graft(self, parent: Node, run: TokenRun, start: int, stop: int) -> Node:
        """A new node below `parent` for pages `start` to `stop` of `run`; nothing there has its first page yet."""
        step = run.page_bytes
        key = run.data[start * step : stop * step]
        edge = key[:step]
        if parent is self.root:
            edge = run.salt + edge
        if edge in parent.children:
            raise CommplaneError(f"cache: {parent} has a child that begins like the one to be added")
        node = Node(self._next, parent, edge, key, stop - start)
        node.salt = run.salt if parent is self.root else b""
        if self._names:
            node.names = run.keys(start, stop)
        parent.children[edge] = node
        self._next += 1
        self.size += 1
        self._journal.note("new node", node.seq, parent.seq, zlib.crc32(key, stop - start))
        return node

    def split(self, lower: Node, pages: int) -> Node:
        """Put a new node before `lower` that takes its first `pages` pages. `lower` keeps its end, its pins and its children."""
        parent = lower.parent
        assert parent is not None
        cut = pages * self.page_tokens * 4
        upper = Node(self._next, parent, lower.edge, lower.key[:cut], pages)
        self._next += 1
        self.size += 1
        parent.children[upper.edge] = upper
        lower.parent, lower.key, lower.count = upper, lower.key[cut:], lower.count - pages
        lower.edge = lower.key[: self.page_tokens * 4]
        upper.children[lower.edge] = lower
        upper.salt, lower.salt = lower.salt, b""
        if lower.names is not None:
            upper.names, lower.names = lower.names[:pages], lower.names[pages:]
        if lower.device is not None:
            upper.device, lower.device = lower.device[:pages], lower.device[pages:]
            upper.on_device = 1
        if lower.host is not None:
            upper.host, lower.host = lower.host[:pages], lower.host[pages:]
        for name in ("device_ready", "host_ready", "stored", "spoilt", "locks", "clock", "hits", "priority"):
            setattr(upper, name, getattr(lower, name))
        for name in ("writing", "loading", "putting"):
            work = getattr(lower, name)
            if work is not None:  # what is on its way for one is now on its way for both
                setattr(upper, name, work)
                work.nodes.append(upper)
        self._journal.note("split", lower.seq, upper.seq, pages)
        if self.on_split is not None:
            self.on_split(upper)
        return upper

    def remove(self, node: Node) -> None:
        """Forget a leaf that holds nothing."""
        parent = node.parent
        if parent is None or node.children or node.locks or node.pins or node.device is not None or node.host is not None:
            raise CommplaneError(f"cache: {node} is still needed and was to be removed")
        del parent.children[node.edge]
        node.parent = None
        self.size -= 1
        self._journal.note("removed", node.seq, parent.seq, node.count)

    def lock(self, node: Node) -> None:
        """One more request uses `node` and everything before it."""
        self._journal.mix(1, node.seq)
        above: Node | None = node
        while above is not None:
            if not above.locks and above.device_ready:
                self.locked += above.count
            above.locks += 1
            above = above.parent

    def unlock(self, node: Node) -> list[Node]:
        """Take a lock back: the nodes that nobody locks any more, leaf first."""
        self._journal.mix(2, node.seq)
        above: Node | None = node
        free: list[Node] = []
        while above is not None:
            if above.locks < 1:
                raise CommplaneError(f"cache: {above} was to be unlocked and nobody had locked it")
            above.locks -= 1
            if above.locks == 0:
                free.append(above)
                if above.device_ready:
                    self.locked -= above.count
            above = above.parent
        return free

    def nodes(self) -> Iterator[Node]:
        """All nodes but the root, parents first, in the order of their creation below one parent."""
        open_ = list(self.root.children.values())
        while open_:
            node = open_.pop()
            yield node
            open_.extend(node.children.values())


def _common(data: bytes, place: int, key: bytes, step: int) -> int:
    """Whole pages that `data` from `place` on and `key` have in common, where not all of `key` is."""
    size = min(len(key), (len(data) - place) // step * step)
    differ = np.frombuffer(data, "<i4", size // 4, place) != np.frombuffer(key, "<i4", size // 4)
    first = int(differ.argmax()) if size else 0
    return size // step if not size or not differ[first] else first * 4 // step
