"""What the registry does, without HTTP: groups by name, and waiting for their changes. Runs on one event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from commplane_disagg.registry.addresses import reachable_host
from commplane_disagg.registry.dp_ranks import DpRankTable
from commplane_disagg.registry.metrics import Metrics
from commplane_disagg.registry.refusals import Full, UnknownRow
from commplane_disagg.registry.table import Table
from commplane_disagg.wire import (
    Changes,
    Coordinate,
    Readiness,
    Registered,
    Registration,
    Row,
    TableView,
    Tenure,
    encode,
)

__all__ = ["GROUPS", "LONGEST_WAIT", "Group", "Service"]

GROUPS = 64
"""Groups that one registry keeps."""

LONGEST_WAIT = 30.0
"""Seconds that a request may ask to wait; who wants more asks again."""


class Group:
    """A table, the rooms that belong to it, and who waits for it to change."""

    def __init__(self, name: str, now: Callable[[], float], lease: float, since: int) -> None:
        self.name = name
        self.table = Table(now, lease, since=since)
        self.rooms = DpRankTable(now)
        self.told = since  # changes that waiters and metrics know of
        self.waiters: set[asyncio.Future[None]] = set()
        self._views: dict[str, tuple[int, bytes]] = {}

    @property
    def idle(self) -> bool:
        """Whether there is nothing in it, and nobody waits for something."""
        self.table.expire()
        self.rooms.expire()
        return not self.table.held and not self.rooms and not self.waiters

    def view(self, server: str, content_type: str) -> bytes:
        """The whole table, encoded; made once a change, for all ranks of a job ask for the same."""
        self.table.expire()
        sequence = self.table.feed.sequence
        known = self._views.get(content_type)
        if known is None or known[0] != sequence:
            table = self.table
            view = TableView(
                server=server,
                sequence=sequence,
                topology=table.topology,
                ready=table.ready,
                rows=table.rows(),
                lease=table.lease,
            )
            known = self._views[content_type] = (sequence, encode(view, content_type))
        return known[1]


class Service:
    """All groups of one registry.

    Args:
        lease: seconds that a row lives without renewal.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, lease: float = 10.0, now: Callable[[], float] = time.monotonic) -> None:
        self.server = secrets.token_hex(8)
        self.lease = lease
        self.metrics = Metrics()
        self._now = now
        self._groups: OrderedDict[str, Group] = OrderedDict()  # in the order in which they were last named
        self._dropped = 0  # number of the last change of any group that was dropped
        self._closing = False

    @property
    def empty(self) -> bool:
        """Whether no group has a row. For any thread."""
        return not any(group.table.held for group in list(self._groups.values()))

    def group(self, name: str) -> Group:
        """The group; one that nobody has named before is empty. Where there are too many, an empty one goes that nobody uses.

        Raises:
            Full: all of them are in use.
        """
        found = self._groups.get(name)
        if found is None:
            if len(self._groups) >= GROUPS:
                self._drop_one(name)
            # Changes go on from where they ended: whoever followed a group that was dropped sees that it has missed some.
            found = self._groups[name] = Group(name, self._now, self.lease, self._dropped)
        self._groups.move_to_end(name)
        return found

    def _drop_one(self, wanted: str) -> None:
        """The idle group that was named longest ago: it also remembers who withdrew, while there is room for it."""
        idle = next((group for group in self._groups.values() if group.idle), None)
        if idle is None:
            raise Full(f"the registry keeps {GROUPS} groups and all are in use, found one more, {wanted!r}: run another registry")
        del self._groups[idle.name]
        self._dropped = max(self._dropped, idle.table.feed.sequence)
        self.metrics.forget(idle.name)

    def register(self, group: Group, asked: Registration, peer: str | None) -> Registered:
        """Take or keep a row; see `Table.register`. `peer` is the address that the request came from."""
        row = asked.row
        host = reachable_host(row.host, peer, asked.peer_address)
        if host != row.host:
            row = msgspec.structs.replace(row, host=host)
        group.table.register(asked.topology, row)
        self._tell(group)
        return self._registered(group, row)

    def renew(self, group: Group, tenure: Tenure) -> Registered:
        """Start a lease anew; see `Table.renew`."""
        row = group.table.renew(tenure)
        self._tell(group)
        return self._registered(group, row)

    def withdraw(self, group: Group, tenure: Tenure) -> Registered:
        """Give a row up; see `Table.withdraw`."""
        group.table.withdraw(tenure)
        self._tell(group)
        return Registered(server=self.server, sequence=group.table.feed.sequence, lease=0.0, host="")

    def row(self, group: Group, key: Coordinate) -> Row:
        """One row.

        Raises:
            UnknownRow: there is none.
        """
        group.table.expire()
        held = group.table.held.get(key)
        if held is None:
            raise UnknownRow(f"there is no row {key} in group {group.name!r}")
        return held.row

    async def readiness(self, group: Group, wait: float) -> Readiness:
        """Whether all ranks have come; waits up to `wait` seconds for it."""
        await self._wait(group, wait, lambda: group.table.ready)
        missing, count = group.table.missing()
        return Readiness(
            server=self.server,
            sequence=group.table.feed.sequence,
            topology=group.table.topology,
            ready=group.table.ready,
            missing=missing,
            missing_count=count,
        )

    async def changes(self, group: Group, since: int, wait: float) -> Changes:
        """Changes after `since`; waits up to `wait` seconds for the first."""
        await self._wait(group, wait, lambda: group.table.feed.sequence != since)
        reset, found = group.table.feed.since(since)
        return Changes(server=self.server, sequence=group.table.feed.sequence, reset=reset, changes=found)

    async def sweep(self) -> None:
        """End leases when they are over, so that who waits is told. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(min(0.25, self.lease / 10))
            for group in self._groups.values():  # nothing is awaited in here, so no request changes it meanwhile
                group.table.expire()
                group.rooms.expire()
                self._tell(group)

    def close(self) -> None:
        """Let go of everybody who waits: they are answered with what there is."""
        self._closing = True
        for group in self._groups.values():
            self._wake(group)

    def page(self) -> bytes:
        """The metrics."""
        for group in self._groups.values():
            table = group.table
            wanted = table.topology.size if table.topology is not None else 0
            self.metrics.observe(group.name, len(table.held), wanted, table.ready, len(group.rooms))
        return self.metrics.render()

    async def _wait(self, group: Group, seconds: float, over: Callable[[], bool]) -> None:
        group.table.expire()
        self._tell(group)
        loop = asyncio.get_running_loop()
        end = loop.time() + min(seconds, LONGEST_WAIT)
        while not over() and not self._closing and (left := end - loop.time()) > 0:
            future: asyncio.Future[None] = loop.create_future()
            group.waiters.add(future)
            self.metrics.waiting.inc()
            try:
                await asyncio.wait([future], timeout=left)
            finally:
                self.metrics.waiting.dec()
                group.waiters.discard(future)
                future.cancel()

    def _tell(self, group: Group) -> None:
        sequence = group.table.feed.sequence
        if sequence == group.told:
            return
        for change in group.table.feed.since(group.told)[1]:
            self.metrics.changed(group.name, change.kind)
        group.told = sequence
        self._wake(group)

    def _wake(self, group: Group) -> None:
        for future in group.waiters:
            if not future.done():
                future.set_result(None)

    def _registered(self, group: Group, row: Row) -> Registered:
        return Registered(server=self.server, sequence=group.table.feed.sequence, lease=self.lease, host=row.host)
