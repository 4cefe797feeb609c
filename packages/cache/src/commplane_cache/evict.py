"""Which node goes first: a queue of candidates for each tier.

Ordered by what the policy says and then by the number of the node: never by wall time, address or hash, so that all ranks choose
the same victims. Whatever a policy orders by may only grow in a node's life. So an entry that is out of date stands too early, is
found at the head, and is put back where it belongs: nothing has to be searched when a node is used.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from commplane.errors import ConfigError
from commplane_cache.tree import Node

__all__ = ["POLICIES", "VictimQueue"]

Order = Callable[[Node], tuple[int, ...]]

POLICIES: dict[str, Order] = {
    "lru": lambda node: (node.clock,),
    "lfu": lambda node: (node.hits, node.clock),
    "priority": lambda node: (node.priority, node.clock),
}
"""Eviction policies: what comes first in this order goes first. ``priority``: the lowest number, then the longest not used."""


class VictimQueue:
    """Candidates of one tier.

    Args:
        policy: a name of `POLICIES`.
        bit: under which `Node.queued` says that a node is in here.
        may_go: whether a node may be taken from its tier now.
    """

    def __init__(self, policy: str, bit: int, may_go: Callable[[Node], bool]) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"cache: wanted an eviction policy of {', '.join(POLICIES)}, found {policy!r}")
        self._order, self._bit, self.may_go = POLICIES[policy], bit, may_go
        self._heap: list[tuple[tuple[int, ...], int, Node]] = []

    def consider(self, node: Node) -> None:
        """`node` may have become a candidate. To be called after every change that can make it one."""
        if not node.queued & self._bit and self.may_go(node):
            node.queued |= self._bit
            heapq.heappush(self._heap, (self._order(node), node.seq, node))

    def pop(self) -> Node | None:
        """The next victim, which leaves the queue; None if there is none."""
        heap = self._heap
        while heap:
            order, seq, node = heap[0]
            if self.may_go(node):
                now = self._order(node)
                if now != order:
                    heapq.heapreplace(heap, (now, seq, node))
                    continue
                heapq.heappop(heap)
                node.queued &= ~self._bit
                return node
            heapq.heappop(heap)
            node.queued &= ~self._bit
        return None

    def __iter__(self) -> Iterator[Node]:
        return (node for _, _, node in self._heap)
