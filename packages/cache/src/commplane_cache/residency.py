"""Where the pages of the tree lie: which node has pages on which tier, who goes when room is needed, and what is copied.

All decisions follow from calls that every rank makes alike and from agreed values, so every rank comes to the same ones. What
ends at different times on each rank (copies, writes to storage) is `Work` in a queue, and changes the tree when all ranks have
ended it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from commplane.errors import CommplaneError
from commplane_cache.evict import VictimQueue
from commplane_cache.metrics import Counters
from commplane_cache.results import Match
from commplane_cache.storage import StoreLink
from commplane_cache.tiers import HELD, MOVING, TREE, Copier, Pool
from commplane_cache.tree import Journal, Node, RadixTree, TokenRun
from commplane_cache.work import Work, WorkQueue

__all__ = ["Residency"]


class Residency:
    """The tree with its pools.

    Attributes:
        tree: the structure.
        device, host: pools; `host` may be None.
        writes, loads, puts: what is on its way from device to host, from host to device, from host to storage.
        promised: pages that calls since the last round wanted and did not get; what is being written is for them.
    """

    def __init__(
        self,
        tree: RadixTree,
        journal: Journal,
        counters: Counters,
        device: Pool,
        host: Pool | None,
        copier: Copier | None,
        link: StoreLink | None,
        *,
        policy: str,
        write_back: bool,
    ) -> None:
        self.tree, self.device, self.host = tree, device, host
        self.writes, self.loads, self.puts = WorkQueue(), WorkQueue(), WorkQueue()
        self._journal, self._counters, self._copier, self._link = journal, counters, copier, link
        self._write_back = write_back
        self.promised = 0
        tree.on_split = self.consider
        self.device_victims = VictimQueue(policy, 1, _may_leave_device)
        self.host_victims = VictimQueue(policy, 2, _may_leave_host)

    def consider(self, node: Node) -> None:
        """`node` changed in a way that may make it a victim."""
        self.device_victims.consider(node)
        self.host_victims.consider(node)

    def look_up(self, run: TokenRun, priority: int, *, count: bool, selective: int) -> Match:
        """What there is of `run` from its start: pages on the device, then pages on the host. Notes the use.

        Args:
            run: what is looked for.
            priority: of the request.
            count: whether this is a use of its own.
            selective: uses after which a node is backed up; 0 for never.
        """
        path: list[Node] = []
        device: list[np.ndarray] = []
        host, clock = 0, self.tree.clock
        device_node = self.tree.root
        for node in self.tree.walk(run)[0]:
            if not host and node.device_ready:
                assert node.device is not None
                device.append(node.device)
                device_node = node
            elif node.host_ready:
                host += node.count
            else:
                break
            path.append(node)
            node.clock = clock
            node.hits += count
            if priority > node.priority:
                node.priority = priority
            if selective and node.hits >= selective and node.host is None:
                self.back_up(node)
        pages = device[0] if len(device) == 1 else np.concatenate(device) if device else np.empty(0, np.int64)
        return Match(run, pages, host, device_node, path[-1] if path else self.tree.root, tuple(path))

    # Room.

    def make_device_room(self, pages: int, *, asks_again: bool = False) -> bool:
        """Evict until `pages` are available on the device; False if they are not yet: some may have to be written first.

        Args:
            pages: how many.
            asks_again: whether the caller comes back for them after a step: what is written until then is not for others.
        """
        pool, aside = self.device, []
        if pool.available >= pages:
            return True
        # Nothing is evicted for what cannot be had, whoever goes.
        if pool.available + pool.owned[TREE] - self.tree.locked < pages:
            return False
        wanted = pages + self.promised
        # What a call before this one has sent to the host leaves when it is there: no need to write others as well.
        coming = sum(n.count for work in self.writes if work.leaves for n in work.nodes if n.device_ready and not n.locks)
        while pool.available < pages and pool.available + coming < wanted:
            node = self.device_victims.pop()
            if node is None:
                break
            if node.host_ready:
                self._evict_device(node)
            elif self._write_back and self._leave(node):
                coming += node.count
            elif not node.children and not node.pins:
                self._evict_device(node)
            elif self._leave(node, again=True):  # what lies below it on the host would be cut off
                coming += node.count
            elif self._drop_below(node):
                self._evict_device(node)
            else:
                aside.append(node)
        for node in aside:
            self.consider(node)
        if pool.available >= pages:
            return True
        if asks_again:
            self.promised += pages
        return False

    def make_host_room(self, pages: int) -> bool:
        """Evict until `pages` are available on the host."""
        pool = self.host
        if pool is None:
            return False
        if pool.available >= pages:
            return True
        # Nothing is evicted for what cannot be had: pages that storage or a load still reads stay until that has ended.
        read = self.puts.pages + sum(n.count for work in self.loads for n in work.nodes if n.putting is None)
        if pool.available + pool.owned[TREE] - read < pages:
            return False
        while pool.available < pages:
            node = self.host_victims.pop()
            if node is None:
                return False
            self._evict_host(node)
        return True

    def _leave(self, node: Node, *, again: bool = False) -> bool:
        """Back up `node`, which goes from the device when that has ended."""
        if not self.back_up(node, again=again):
            return False
        assert node.writing is not None
        node.writing.leaves = True
        return True

    def _drop_below(self, node: Node) -> bool:
        """Forget all that comes after `node`, which is on the host alone; False if something there is needed or on its way.

        Where `node` cannot be backed up, it would keep its device pages for ever otherwise.
        """
        below = [node]
        for above in below:  # grows meanwhile
            below.extend(above.children.values())
        if any(n.pins or n.putting is not None for n in below):
            return False
        if any(n.device is not None or n.locks for n in below[1:]):
            return False
        for child in reversed(below[1:]):
            self._evict_host(child)
        return True

    def _evict_host(self, node: Node) -> None:
        assert self.host is not None
        assert node.host is not None
        self.host.give_back(node.host, TREE)
        node.host, node.host_ready = None, False
        self._counters.host.evicted += node.count
        self._journal.note("host evict", node.seq, node.count)
        self._drop_if_nowhere(node)

    def _evict_device(self, node: Node) -> None:
        assert node.device is not None
        self.device.give_back(node.device, TREE)
        self._no_device(node)
        self._counters.device.evicted += node.count
        self._journal.note("device evict", node.seq, node.count)
        self._drop_if_nowhere(node)

    def _no_device(self, node: Node) -> None:
        """`node` has no device pages any more, which may free its parent for eviction."""
        node.device, node.device_ready = None, False
        if node.parent is not None:
            node.parent.on_device -= 1
            self.consider(node.parent)

    def _drop_if_nowhere(self, node: Node) -> None:
        parent = node.parent
        if node.device is None and node.host is None and parent is not None:
            self.tree.remove(node)
            self.consider(parent)
        else:
            self.consider(node)

    # Pages that come in.

    def adopt_device(self, run: TokenRun, start: int, pages: np.ndarray, priority: int) -> tuple[list[Node], np.ndarray]:
        """The tree takes `pages`, which a request held: nodes of the run, and the pages that the tree now has for them.

        Where the tree has pages already, those given are freed. The run up to `start` is in the tree.
        """
        stop, pool = start + len(pages), self.device
        _, have = self.tree.walk(run, start)
        if have < start:
            raise CommplaneError(
                f"cache: insert wants {start} pages before its own in the tree and {have} are there; lock the match"
            )
        path, known = self.tree.walk(run, stop)
        final: list[np.ndarray] = []
        place = 0
        for node in path:
            place += node.count
            if place <= start:
                continue
            given = pages[place - node.count - start : place - start]
            if node.device_ready:
                pool.give_back(given, HELD)
            else:
                if node.loading is not None:  # a copy fills pages that nobody will need: freed when it has ended everywhere
                    assert node.device is not None
                    node.loading.orphans.append(node.device)
                    node.loading.nodes.remove(node)
                    node.loading = None
                elif node.parent is not None:
                    node.parent.on_device += 1
                if node.locks:
                    self.tree.locked += node.count
                pool.hand_over(given, HELD, TREE)
                node.device, node.device_ready = given, True
                self._counters.device.filled += node.count
                self._journal.note("device adopt", node.seq, node.count)
            assert node.device is not None
            final.append(node.device)
        if known < stop:
            parent = path[-1] if path else self.tree.root
            node = self.tree.graft(parent, run, known, stop)
            given = pages[known - start :]
            pool.hand_over(given, HELD, TREE)
            node.device, node.device_ready = given, True
            parent.on_device += 1
            node.clock, node.hits, node.priority = self.tree.clock, 1, priority
            self._counters.device.filled += node.count
            path.append(node)
            final.append(given)
        return path, np.concatenate(final) if final else pages[:0]

    def adopt_host(self, run: TokenRun, start: int, pages: np.ndarray) -> int:
        """The tree takes host `pages` that were read from storage: how many it had use for. The others are freed."""
        pool = self.host
        assert pool is not None
        stop = start + len(pages)
        path, known = self.tree.walk(run, start)
        if known < start:  # what they were to follow is gone
            pool.give_back(pages, MOVING)
            return 0
        path, known = self.tree.walk(run, stop)
        place = used = 0
        for node in path:
            place += node.count
            if place <= start:
                continue
            given = pages[place - node.count - start : place - start]
            node.stored = True
            if node.host is not None:
                pool.give_back(given, MOVING)
                continue
            self._own_host(node, given)
            used += node.count
        if known < stop:
            node = self.tree.graft(path[-1] if path else self.tree.root, run, known, stop)
            node.clock, node.stored = self.tree.clock, True
            self._own_host(node, pages[known - start :])
            used += node.count
        self._counters.host.filled += used
        return used

    def _own_host(self, node: Node, pages: np.ndarray) -> None:
        assert self.host is not None
        self.host.hand_over(pages, MOVING, TREE)
        node.host, node.host_ready, node.spoilt = pages, True, 0
        self._journal.note("host adopt", node.seq, node.count)
        self.consider(node)

    # Copies and writes.

    def back_up(self, node: Node, *, again: bool = False) -> bool:
        """Start to copy `node` to the host; False if it is there, was tried in vain, or there is no room.

        Args:
            node: which.
            again: also if that failed once; never a third time.
        """
        if self.host is None or self._copier is None or node.host is not None or not node.device_ready:
            return False
        if node.spoilt > again:
            return False
        if not self.make_host_room(node.count):
            self._counters.host.skipped += node.count
            return False
        assert node.device is not None
        node.host = self.host.take(node.count, MOVING)
        node.writing = work = Work([node], node.count)
        try:
            work.event = self._copier.to_host(node.device, node.host)
        except Exception as error:  # whatever it was, the other ranks have started theirs: it is voted on
            work.end(f"{type(error).__name__}: {error}")
        else:
            if work.event is None:
                work.end()
        self.writes.add(work)
        self._journal.note("write", node.seq, node.count)
        return True

    def load(self, path: Iterable[Node]) -> Work | None:
        """Start to copy nodes from the host to the device, as many from the first on as find room."""
        nodes: list[Node] = []
        for node in path:
            if not node.host_ready or node.device is not None:
                break
            nodes.append(node)
        if not nodes or self._copier is None:
            return None
        self.tree.lock(nodes[-1])  # or making room could take what is to be loaded
        while nodes and not self.make_device_room(sum(n.count for n in nodes)):
            self.unlock(nodes.pop())
            if nodes:
                self.tree.lock(nodes[-1])
        if not nodes:
            return None
        work = Work(nodes, sum(n.count for n in nodes))
        pages = self.device.take(work.pages, MOVING)
        place = 0
        for node in nodes:
            assert node.parent is not None
            node.device, node.loading = pages[place : place + node.count], work
            node.parent.on_device += 1
            place += node.count
            self._journal.note("load", node.seq, node.count)
        self.unlock(nodes[-1])
        try:
            work.event = self._copier.to_device(np.concatenate([n.host for n in nodes if n.host is not None]), pages)
        except Exception as error:  # as above
            work.end(f"{type(error).__name__}: {error}")
        else:
            if work.event is None:
                work.end()
        self.loads.add(work)
        return work

    def put(self, node: Node) -> None:
        """Start to write `node` to storage."""
        if self._link is None or node.stored or node.putting is not None or not node.host_ready:
            return
        assert node.names is not None
        assert node.host is not None
        node.putting = work = Work([node], node.count)
        self.puts.add(work)
        self._journal.note("put", node.seq, node.count)
        self._link.put(node.names, node.host, work)

    def unlock(self, node: Node) -> None:
        """Take a lock back."""
        for free in self.tree.unlock(node):
            self.consider(free)

    # What all ranks have ended.

    def drain_writes(self, ended: int, good: int) -> int:
        """Nodes whose copy to the host all ranks have ended are on the host, or given up there: how many."""
        done = self.writes.drain(ended, good)
        for work in done:
            self._journal.note("write end", work.nodes[0].seq, work.pages, bool(work.agreed))
            for node in work.nodes:
                assert self.host is not None
                assert node.host is not None
                node.writing = None
                if work.agreed:
                    self.host.hand_over(node.host, MOVING, TREE)
                    node.host_ready = True
                    self.put(node)
                else:
                    self.host.give_back(node.host, MOVING)
                    node.host = None
                    node.spoilt += 1
                self.consider(node)
            tier = self._counters.host
            if work.agreed:
                tier.filled += work.pages
            else:
                tier.failed += work.pages
        return len(done)

    def drain_loads(self, ended: int, good: int) -> int:
        """Nodes whose load all ranks have ended are on the device, or not: how many."""
        done = self.loads.drain(ended, good)
        for work in done:
            self._journal.note("load end", work.pages, len(work.nodes), bool(work.agreed))
            for pages in work.orphans:
                self.device.give_back(pages, MOVING)
            for node in work.nodes:
                assert node.device is not None
                node.loading = None
                if work.agreed:
                    self.device.hand_over(node.device, MOVING, TREE)
                    node.device_ready = True
                    if node.locks:
                        self.tree.locked += node.count
                else:
                    self.device.give_back(node.device, MOVING)
                    self._no_device(node)
                self.consider(node)
            if work.agreed:
                self._counters.host.moved += work.pages
            else:
                self._counters.device.failed += work.pages
        return len(done)

    def drain_puts(self, ended: int, good: int) -> int:
        """Nodes whose write to storage all ranks have ended are stored, or not: how many."""
        done = self.puts.drain(ended, good)
        tier = self._counters.storage
        for work in done:
            self._journal.note("put end", work.nodes[0].seq, work.pages, bool(work.agreed))
            for node in work.nodes:
                node.putting, node.stored = None, bool(work.agreed)
                self.consider(node)
            if work.agreed:
                tier.filled += work.pages
            else:
                tier.failed += work.pages
        return len(done)


def _may_leave_device(node: Node) -> bool:
    return node.device_ready and not node.locks and not node.on_device and node.writing is None


def _may_leave_host(node: Node) -> bool:
    if not node.host_ready or node.loading is not None or node.putting is not None:
        return False
    return node.device_ready or not (node.locks or node.pins or node.children)
