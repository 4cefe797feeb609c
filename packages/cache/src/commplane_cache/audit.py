"""Proof that a cache is in order: every page has one owner, every node says the truth. For tests, and every now and then."""

from __future__ import annotations

import numpy as np

from commplane.errors import CommplaneError
from commplane_cache.prefetch import PrefetchSlots
from commplane_cache.residency import Residency
from commplane_cache.tree import Node, RadixTree

__all__ = ["audit"]


def audit(tree: RadixTree, residency: Residency, prefetches: PrefetchSlots) -> None:
    """Look at everything; raises a `CommplaneError` for the first thing that is wrong."""
    device: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])  # in the tree, moving
    host: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    pins: dict[int, int] = {}
    for prefetch in [*prefetches.slots, *prefetches.queue]:
        if prefetch is not None:
            if prefetch.pages is not None:
                host[1].append(prefetch.pages)
            if prefetch.anchor is not None:
                pins[prefetch.anchor.seq] = pins.get(prefetch.anchor.seq, 0) + 1
    for work in residency.loads:
        device[1].extend(work.orphans)
    found = locked = 0
    for node in tree.nodes():
        found += 1
        _node(node, tree)
        if node.pins != pins.get(node.seq, 0):
            raise CommplaneError(f"cache: {node} has {node.pins} pins, and {pins.get(node.seq, 0)} prefetches hold it")
        if node.device is not None:
            device[not node.device_ready].append(node.device)
        if node.host is not None:
            host[not node.host_ready].append(node.host)
        for queue, bit in ((residency.device_victims, 1), (residency.host_victims, 2)):
            if queue.may_go(node) and not node.queued & bit:
                raise CommplaneError(f"cache: {node} could be evicted and is in no queue")
        if node.locks and node.device_ready:
            locked += node.count
    if locked != tree.locked:
        raise CommplaneError(f"cache: {locked} pages on the device are locked, counted were {tree.locked}")
    if residency.puts.pages != sum(n.count for work in residency.puts for n in work.nodes):
        raise CommplaneError(f"cache: {residency.puts.pages} pages are counted as on their way to storage, which is wrong")
    if found != tree.size:
        raise CommplaneError(f"cache: the tree has {found} nodes and counts {tree.size}")
    residency.device.audit(*device)
    if residency.host is not None:
        residency.host.audit(*host)


def _node(node: Node, tree: RadixTree) -> None:
    parent = node.parent
    if parent is None or parent.children.get(node.edge) is not node:
        raise CommplaneError(f"cache: {node} is not where its parent has it")
    step = tree.page_tokens * 4
    if not node.count or len(node.key) != node.count * step or node.edge != node.salt + node.key[:step]:
        raise CommplaneError(f"cache: {node} does not have the tokens of its pages")
    if parent is not tree.root and (node.salt or parent.locks < node.locks):
        raise CommplaneError(f"cache: {node} has more locks than its parent, or a salt in the middle of a run")
    if node.on_device != sum(child.device is not None for child in node.children.values()):
        raise CommplaneError(f"cache: {node} counts {node.on_device} children on the device, which is wrong")
    for tier, pages, ready, moving in (
        ("device", node.device, node.device_ready, node.loading),
        ("host", node.host, node.host_ready, node.writing),
    ):
        if pages is not None and len(pages) != node.count:
            raise CommplaneError(f"cache: {node} has {len(pages)} pages on the {tier}")
        if (pages is not None) != (ready or moving is not None) or (ready and moving is not None):
            raise CommplaneError(f"cache: {node} is neither here nor on its way to the {tier}")
    if node.device is None and node.host is None:
        raise CommplaneError(f"cache: {node} is nowhere")
    if node.names is not None and len(node.names) != node.count:
        raise CommplaneError(f"cache: {node} has {len(node.names)} keys")
