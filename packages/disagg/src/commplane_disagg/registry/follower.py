"""A live view of a group's rows, kept by a thread, for a scheduler loop that must not wait for the network.

A registry that is down takes nothing away: the view stays as it was. After its restart the rows come back as their ranks renew,
so a row that is not there yet is kept for the length of a lease before it counts as gone. What changed is told in `Change`s
numbered by the follower, for the registry's own numbers begin anew with each of its starts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Literal

from commplane.errors import CommplaneError
from commplane_disagg.registry.client import RegistryClient
from commplane_disagg.wire import Change, Coordinate, Row, TableView, Topology

__all__ = ["Follower"]

_log = logging.getLogger("commplane_disagg")

_PAUSE = 0.25


class Follower:
    """Rows of a group as they are now. `rows`, `topology` and `poll` never wait.

    Args:
        client: of the group; the follower has connections of its own.
        wait: seconds of one long poll.

    Raises:
        PeerError, ConfigError: the table could not be read at first.
    """

    def __init__(self, client: RegistryClient, *, wait: float = 10.0) -> None:
        self._client, self._wait = client.another(), wait
        self._lock = threading.Lock()
        self._rows: dict[Coordinate, Row] = {}
        self._suspects: dict[Coordinate, float] = {}  # kept over a restart of the registry, until this moment
        self._told: deque[Change] = deque()
        self._number = 0
        self._heard = time.monotonic()
        self._topology: Topology | None = None
        self._server, self._since = "", 0
        self._stop = threading.Event()
        try:
            self._load(self._client.table())
        except BaseException:
            self._client.close()
            raise
        self._told.clear()  # what is there at the beginning is no change
        self._thread = threading.Thread(target=self._main, name="commplane-disagg follower", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> dict[Coordinate, Row]:
        """The rows now."""
        with self._lock:
            return dict(self._rows)

    @property
    def topology(self) -> Topology | None:
        """As the ranks declared it; the last one known."""
        with self._lock:
            return self._topology

    @property
    def ready(self) -> bool:
        """Whether every place of the grid has its row."""
        with self._lock:
            return self._topology is not None and len(self._rows) == self._topology.size

    @property
    def silent(self) -> float:
        """Seconds since the registry was heard; above a long poll's, it is down."""
        return time.monotonic() - self._heard

    def poll(self) -> list[Change]:
        """What changed since the last call: rows that came, were taken over by another instance, or are gone."""
        with self._lock:
            told, self._told = list(self._told), deque()
        return told

    def close(self, timeout: float = 5.0) -> None:
        """Stop following. Idempotent."""
        self._stop.set()
        self._client.close()
        self._thread.join(timeout)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _main(self) -> None:
        said = False
        while not self._stop.is_set():
            try:
                self._round()
                said = False
            except CommplaneError as error:
                if not said and not self._stop.is_set():
                    _log.warning("the registry is not heard, rows stay as they are: %s", error)
                said = True
                self._stop.wait(_PAUSE)
            self._give_up_suspects()

    def _round(self) -> None:
        with self._lock:
            first = min(self._suspects.values(), default=None)
        wait = self._wait if first is None else min(self._wait, max(0.0, first - time.monotonic()))
        found = self._client.changes(self._since, wait=wait, timeout=self._client.http.attempt, retry=False)
        self._heard = time.monotonic()
        if found.reset or found.server != self._server:
            self._load(self._client.table(timeout=self._client.http.attempt))
            return
        topology = None
        if any(change.kind == "registered" for change in found.changes):  # the first one of a grid may bring another topology
            view = self._client.table(timeout=self._client.http.attempt)
            if view.server != self._server:
                return  # restarted in between: the next round loads
            topology = view.topology
        with self._lock:
            self._topology = topology or self._topology
            self._since = found.sequence
            for change in found.changes:
                self._apply(change)

    def _apply(self, change: Change) -> None:
        known = self._rows.get(change.key)
        self._suspects.pop(change.key, None)
        if change.row is not None:
            self._arrive(change.row)
        elif known is not None and (known.instance, known.epoch) == (change.instance, change.epoch):
            del self._rows[change.key]
            self._tell("withdrawn" if change.kind == "withdrawn" else "expired", known)

    def _load(self, view: TableView) -> None:
        """Take a whole table in the place of changes that were missed."""
        restarted = self._server not in ("", view.server)
        present = {row.key for row in view.rows}
        end = time.monotonic() + view.lease
        with self._lock:
            self._server, self._since = view.server, view.sequence
            self._topology = view.topology or self._topology
            for row in view.rows:
                self._suspects.pop(row.key, None)
                self._arrive(row)
            for key in [key for key in self._rows if key not in present]:
                if restarted:
                    self._suspects[key] = end
                elif key not in self._suspects:
                    self._tell("expired", self._rows.pop(key))

    def _arrive(self, row: Row) -> None:
        known = self._rows.get(row.key)
        self._rows[row.key] = row
        if known is None:
            self._tell("registered", row)
        elif (known.instance, known.epoch) != (row.instance, row.epoch):
            self._tell("replaced", row, known.instance)

    def _give_up_suspects(self) -> None:
        """Call rows gone that did not come back in time; only while the registry answers can that be known."""
        now = time.monotonic()
        with self._lock:
            if now - self._heard > _PAUSE + self._client.http.attempt:
                return
            for key in [key for key, end in self._suspects.items() if end <= now]:
                del self._suspects[key]
                self._tell("expired", self._rows.pop(key))

    def _tell(self, kind: Literal["registered", "replaced", "withdrawn", "expired"], row: Row, previous: str = "") -> None:
        self._number += 1
        shown = row if kind in ("registered", "replaced") else None
        self._told.append(
            Change(
                sequence=self._number,
                kind=kind,
                key=row.key,
                instance=row.instance,
                epoch=row.epoch,
                previous=previous,
                row=shown,
            )
        )
