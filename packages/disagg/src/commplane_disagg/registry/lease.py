"""A row that stays while its rank lives: registered, renewed from a thread, registered again where the registry was restarted."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

from commplane.errors import CommplaneError
from commplane_disagg.registry.client import RegistryClient
from commplane_disagg.registry.requests import RefusedError
from commplane_disagg.wire import Registered, Row, Tenure, Topology

__all__ = ["Lease"]

_log = logging.getLogger("commplane_disagg")

_RENEWALS = 3
"""Renewals in the length of a lease: two may be lost."""


class Lease:
    """This rank's row, from construction to `close`.

    A registry that cannot be reached is no error here: the row may expire there, and is registered again once it answers. What
    ends a lease for good is that the registry gives the row to another instance, or that other ranks contradict this one.

    Args:
        client: of the group.
        topology: as all ranks of the group declare it.
        row: of this rank.
        peer_address: put the address the registry sees in the place of a wildcard or loopback host.
        timeout: seconds for the first registration; the client's if None.
        on_lost: called once, from the lease's thread, with the reason, when the row is lost for good.

    Raises:
        PeerError, ConfigError, AgreementError: the first registration failed; the text names rank, registry and cause.
    """

    def __init__(
        self,
        client: RegistryClient,
        topology: Topology,
        row: Row,
        *,
        peer_address: bool = False,
        timeout: float | None = None,
        on_lost: Callable[[CommplaneError], None] | None = None,
    ) -> None:
        self._client, self._topology, self._peer_address, self._on_lost = client, topology, peer_address, on_lost
        self._tenure = Tenure(key=row.key, instance=row.instance, epoch=row.epoch)
        self.row = row
        self.error: CommplaneError | None = None
        self.registrations = 0
        self._stop = threading.Event()
        self._said = False
        self._answered = time.monotonic()
        self._take(client.register(topology, row, peer_address=peer_address, timeout=timeout))
        self.registrations += 1
        self._thread = threading.Thread(target=self._main, name=f"commplane-disagg lease {row.key}", daemon=True)
        self._thread.start()

    @property
    def overdue(self) -> float:
        """Seconds since the row has certainly expired at the registry; 0 while it may be there."""
        return max(0.0, time.monotonic() - self._answered - self.seconds)

    def check(self) -> None:
        """Raise what ended the lease for good, if something did. Cheap: reads one attribute."""
        if self.error is not None:
            raise self.error

    def close(self, timeout: float = 5.0) -> bool:
        """Stop renewing and withdraw: whether the registry confirmed it; else the row expires. Idempotent, never raises."""
        if self._stop.is_set():
            return False
        self._stop.set()
        self._thread.join(timeout)
        try:
            return self._client.withdraw(self._tenure, timeout=timeout)
        except CommplaneError as error:
            _log.info("row %s was not withdrawn and ends by itself: %s", self.row.key, error)
            return False

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _take(self, answer: Registered) -> None:
        self.server, self.seconds, self.host = answer.server, answer.lease, answer.host or self.row.host
        self._answered = time.monotonic()

    def _main(self) -> None:
        pause = self.seconds / _RENEWALS
        while not self._stop.wait(pause * random.uniform(0.8, 1.0)):
            pause = self.seconds / _RENEWALS
            try:
                self._take(self._client.renew(self._tenure, timeout=self.seconds, retry=False))
                self._said = False
            except RefusedError as refused:
                if self._stop.is_set():
                    return  # closed meanwhile: nothing is owed to this row any more
                if refused.problem.code == "unknown_row":
                    self._again()
                elif refused.problem.code == "stale":
                    self._lose(refused.typed(f"rank {self.row.key} lost its row at {self._client.address}: {refused}"))
                else:
                    self._complain(str(refused))
            except CommplaneError as error:
                self._complain(str(error))
                pause /= 4

    def _again(self) -> None:
        """The registry knows nothing of this rank: it was restarted, or did not hear of it for too long."""
        try:
            self._take(self._client.register(self._topology, self.row, peer_address=self._peer_address, timeout=self.seconds))
        except CommplaneError as error:
            if self._stop.is_set():
                return  # closed meanwhile, and what came late was refused, as it has to be
            refused = error.__cause__
            if isinstance(refused, RefusedError) and refused.status == 409:
                self._lose(error)
            else:
                self._complain(str(error))
            return
        self.registrations += 1
        _log.info("rank %s registered again at %s", self.row.key, self._client.address)

    def _lose(self, error: CommplaneError) -> None:
        self.error = error
        self._stop.set()
        _log.error("%s", error)
        if self._on_lost is not None:
            self._on_lost(error)

    def _complain(self, text: str) -> None:
        """Once per outage."""
        if not self._said:
            _log.warning("rank %s cannot renew its row, and goes on trying: %s", self.row.key, text)
            self._said = True
