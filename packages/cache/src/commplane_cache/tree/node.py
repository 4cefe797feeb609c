"""A node: a run of pages after its parent's, and where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from commplane_cache.work import Work

__all__ = ["Node"]


class Node:
    """A run of pages. Everything here is equal on all ranks, but for the numbers of the pages.

    Attributes:
        seq: number of the node, in the order of creation.
        parent: None for the root, and for a node that was removed.
        edge: under which the parent has it: the first page, after the salt if the parent is the root.
        key: the tokens of the run.
        count: pages of the run.
        children: edge -> node.
        salt: that of the run, for children of the root; b"" elsewhere.
        names: keys in storage, one a page; None where no storage is used.
        device: page numbers on the device, or None.
        device_ready: whether they hold the run's bytes; False while a load is on its way.
        host: page numbers on the host, or None.
        host_ready: whether they hold the run's bytes; False while a write is on its way.
        stored: all pages are in the storage of every rank.
        locks: requests whose device pages go through here; counted on all ancestors too.
        pins: those who need the node to stay known, on some tier.
        clock: logical time of the last use.
        hits: number of uses.
        priority: of the most important request that used it.
        writing, loading, putting: what is on its way for it: device to host, host to device, host to storage.
        on_device: children with device pages, ready or not.
        spoilt: writes to the host that failed. It is tried once more, when that is the only way to get its room.
        queued: bits of the victim queues that have it, see `commplane_cache.evict`.
    """

    __slots__ = (
        "children",
        "clock",
        "count",
        "device",
        "device_ready",
        "edge",
        "hits",
        "host",
        "host_ready",
        "key",
        "loading",
        "locks",
        "names",
        "on_device",
        "parent",
        "pins",
        "priority",
        "putting",
        "queued",
        "salt",
        "seq",
        "spoilt",
        "stored",
        "writing",
    )

    def __init__(self, seq: int, parent: Node | None, edge: bytes, key: bytes, count: int) -> None:
        self.seq, self.parent, self.edge, self.key, self.count = seq, parent, edge, key, count
        self.children: dict[bytes, Node] = {}
        self.salt = b""
        self.names: list[bytes] | None = None
        self.device: np.ndarray | None = None
        self.host: np.ndarray | None = None
        self.device_ready = self.host_ready = self.stored = False
        self.spoilt = self.locks = self.pins = self.clock = self.hits = self.priority = self.on_device = self.queued = 0
        self.writing: Work | None = None
        self.loading: Work | None = None
        self.putting: Work | None = None

    def __repr__(self) -> str:
        tiers = "".join(
            letter for letter, there in (("d", self.device_ready), ("h", self.host_ready), ("s", self.stored)) if there
        )
        return f"Node({self.seq}, {self.count} pages, {tiers or '-'}, {self.locks} locks)"
