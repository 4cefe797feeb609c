"""What a rank asks the registry. Synchronous, and safe to call from several threads."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from commplane.api import Deadline
from commplane.errors import CommplaneError, PeerError
from commplane_disagg.registry.requests import RefusedError, RegistryHttp
from commplane_disagg.wire import (
    ROUTES,
    Change,
    Changes,
    Coordinate,
    DpRank,
    DpRanks,
    Readiness,
    Registered,
    Registration,
    RoomQuery,
    Row,
    TableView,
    Tenure,
    Topology,
)

__all__ = ["RegistryClient", "new_instance", "restarts"]

_T = TypeVar("_T")

_POLL = 20.0
"""Seconds of one long poll; below what proxies allow a request."""


def new_instance() -> str:
    """An instance id for this start of this process."""
    return secrets.token_hex(8)


def restarts() -> int:
    """How often torchrun has restarted this job: the natural epoch of its ranks. 0 without torchrun."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isdecimal() else 0


class RegistryClient:
    """The registry as one rank of `group` sees it.

    Every method has a deadline, `timeout` unless it says otherwise, and raises

    - `PeerError` if the registry did not answer, with the address and the last cause;
    - `ConfigError` if it refused the token or what was sent;
    - `AgreementError` if what was sent contradicts what other ranks said.

    Args:
        host: of the registry.
        port: of the registry, as `sync_bootstrap_port` gave it.
        token: the shared one (`read_token`), None where the server was started without authentication.
        group: whose rows; prefill and decode ranks of several models may share a registry.
        timeout: seconds for one call, its retries included.
        attempt: seconds for one try to connect, and of silence after which an exchange is tried again.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        token: bytes | None,
        group: str = "prefill",
        timeout: float = 30.0,
        attempt: float = 5.0,
    ) -> None:
        self.http = RegistryHttp(host, port, token=token, attempt=attempt)
        self.group, self.timeout = group, timeout
        self._path = f"{ROUTES}/groups/{group}"

    @property
    def address(self) -> str:
        """Of the registry, for messages."""
        return self.http.address

    def another(self) -> RegistryClient:
        """The same, with connections and a `close` of its own: for a thread that waits in long polls."""
        copy = object.__new__(RegistryClient)
        copy.http, copy.group, copy.timeout, copy._path = self.http.another(), self.group, self.timeout, self._path
        return copy

    def of(self, group: str) -> RegistryClient:
        """The same registry over the same connections, as another group sees it."""
        copy = object.__new__(RegistryClient)
        copy.http, copy.group, copy.timeout, copy._path = self.http, group, self.timeout, f"{ROUTES}/groups/{group}"
        return copy

    def close(self) -> None:
        """Close connections; calls that other threads have out fail. Idempotent; rows stay until they are withdrawn or expire."""
        self.http.close()

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def register(self, topology: Topology, row: Row, *, peer_address: bool = False, timeout: float | None = None) -> Registered:
        """Take a row, once; `commplane_disagg.registry.Lease` also keeps it. Tries again until it is answered.

        A row that another instance holds is waited for as long as its lease runs.
        """
        asked = Registration(topology=topology, row=row, peer_address=peer_address)
        who = f"rank {row.key} of group {self.group!r} cannot register"
        return self._ask(Registered, "PUT", "/rows", asked, who=who, timeout=timeout)

    def renew(self, tenure: Tenure, *, timeout: float | None = None, retry: bool = True) -> Registered:
        """Start the row's lease anew.

        Raises:
            RefusedError: ``unknown_row`` or ``stale``, for `Lease` to judge.
        """
        who = f"rank {tenure.key} of group {self.group!r} cannot renew its lease"
        seconds = self.timeout if timeout is None else timeout
        return self.http.ask(Registered, "POST", f"{self._path}/renewals", tenure, who=who, timeout=seconds, retry=retry)

    def withdraw(self, tenure: Tenure, *, timeout: float | None = None) -> bool:
        """Give the row up: whether this instance still had it."""
        who = f"rank {tenure.key} of group {self.group!r} cannot withdraw"
        try:
            self._ask(Registered, "POST", "/withdrawals", tenure, who=who, timeout=timeout, typed=False)
        except RefusedError as refused:
            if refused.problem.code in ("unknown_row", "stale"):
                return False
            raise refused.typed(f"{who}: {refused}") from refused
        return True

    def table(self, *, timeout: float | None = None) -> TableView:
        """All rows, in one request."""
        return self._ask(TableView, "GET", "/table", who=f"the table of group {self.group!r} cannot be read", timeout=timeout)

    def lookup(self, key: Coordinate, *, timeout: float | None = None) -> Row | None:
        """One row, or None."""
        path = f"/rows/{key.dp}/{key.cp}/{key.tp}/{key.pp}"
        who = f"row {key} of group {self.group!r} cannot be read"
        try:
            return self._ask(Row, "GET", path, who=who, timeout=timeout, typed=False)
        except RefusedError as refused:
            if refused.problem.code == "unknown_row":
                return None
            raise refused.typed(f"{who}: {refused}") from refused

    def wait_ready(self, timeout: float | None = None) -> TableView:
        """The table, once every rank of the declared grid is in it.

        Raises:
            PeerError: ranks are missing at the deadline; they are named.
        """
        seconds = self.timeout if timeout is None else timeout
        deadline, margin = Deadline(seconds), min(0.5, seconds / 4)  # what is left for the last answer to come back
        who = f"group {self.group!r} cannot be waited for"
        found: Readiness | None = None
        while found is None or deadline.remaining() > margin:
            left = deadline.remaining()
            wait = max(0.0, min(_POLL, left - margin))
            found = self._ask(Readiness, "GET", f"/ready?wait={wait:.3f}", who=who, timeout=max(left, 0.05), wait=wait)
            if found.ready:
                view = self.table(timeout=max(deadline.remaining(), margin, 0.05))
                if view.ready:
                    return view
        raise PeerError(_missing(self.group, self.address, seconds, found))

    def changes(self, since: int, *, wait: float = 0.0, timeout: float | None = None, retry: bool = True) -> Changes:
        """What happened after change `since`; waits up to `wait` seconds for the first. See `Changes` for gaps."""
        wait = min(wait, _POLL)
        who = f"changes of group {self.group!r} cannot be read"
        seconds = (self.timeout if timeout is None else timeout) + wait
        path = f"/changes?since={since}&wait={wait:.3f}"
        return self._ask(Changes, "GET", path, who=who, timeout=seconds, wait=wait, retry=retry)

    def watch(self, since: int, timeout: float) -> Iterator[Change]:
        """Changes after `since` as they come, until `timeout` seconds are over. For a live view of the rows: `Follower`.

        Raises:
            CommplaneError: some changes are not kept any more, or the registry was restarted: read the table again.
        """
        deadline = Deadline(timeout)
        server = ""
        while not deadline.expired:
            found = self.changes(since, wait=deadline.remaining())
            if found.reset or server not in ("", found.server):
                raise CommplaneError(f"the registry at {self.address} has lost changes after {since}: read the table again")
            server, since = found.server, found.sequence
            yield from found.changes

    def register_dp_ranks(self, entries: Iterable[DpRank], *, timeout: float | None = None) -> None:
        """Say which data-parallel ranks serve rooms. Forgotten after two minutes, unless said again."""
        who = f"rooms of group {self.group!r} cannot be registered"
        self._ask(DpRanks, "POST", "/rooms", DpRanks(rooms=tuple(entries)), who=who, timeout=timeout)

    def query_dp_ranks(self, rooms: Iterable[int], *, timeout: float | None = None) -> dict[int, DpRank]:
        """Room -> who serves it, of those that are known."""
        who = f"rooms of group {self.group!r} cannot be read"
        found = self._ask(DpRanks, "POST", "/rooms/query", RoomQuery(rooms=tuple(rooms)), who=who, timeout=timeout)
        return {entry.room: entry for entry in found.rooms}

    def _ask(
        self,
        kind: type[_T],
        method: str,
        path: str,
        body: msgspec.Struct | None = None,
        *,
        who: str,
        timeout: float | None,
        wait: float = 0.0,
        retry: bool = True,
        typed: bool = True,
    ) -> _T:
        seconds = self.timeout if timeout is None else timeout
        try:
            return self.http.ask(kind, method, self._path + path, body, who=who, timeout=seconds, wait=wait, retry=retry)
        except RefusedError as refused:
            if not typed:
                raise
            raise refused.typed(f"{who}: the registry at {self.address} says: {refused}") from refused


def _missing(group: str, address: str, seconds: float, found: Readiness) -> str:
    if found.topology is None:
        return f"group {group!r} is not ready after {seconds:g} s: no rank has registered at {address}; start its ranks"
    names = ", ".join(str(key) for key in found.missing[:16])
    more = f" and {found.missing_count - 16} more" if found.missing_count > 16 else ""
    here = found.topology.size - found.missing_count
    return (
        f"group {group!r} is not ready after {seconds:g} s: {here} of {found.topology.size} ranks are registered at {address}, "
        f"missing are {names}{more}; look at what those ranks say"
    )
