"""Which peers the engine of a prefill end can write to, and how long one is left alone that it could not connect to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from commplane.api.transfer import TransferEngine
from commplane.errors import CommplaneError
from commplane_disagg.ends.peers import Peer

__all__ = ["Reach"]

_PAUSE = 4.0
"""How many times as long as it took to fail to connect a peer is left alone. A stopped one costs the engine's whole timeout, and
is tried again only after the channel has noticed its silence; one that refuses at once may be tried again at once."""


@dataclass(frozen=True)
class _Failure:
    """The engine could not connect to a peer.

    Attributes:
        again: when it is tried again, by the end's clock.
    """

    peer: Peer
    why: str
    again: float


class Reach:
    """Connections of one engine.

    The scheduler stands still while one is made, so a peer that does not answer is not tried for each of its rooms.

    Args:
        engine: of this end.
        clock: seconds, monotonic.
    """

    def __init__(self, engine: TransferEngine, clock: Callable[[], float]) -> None:
        self._engine, self._clock = engine, clock
        self._connected: dict[str, Peer] = {}
        self._stale: set[str] = set()
        self._failures: dict[str, _Failure] = {}

    def has(self, peer: Peer) -> bool:
        """Whether the engine is connected to this process."""
        return self._connected.get(peer.identity.name) is peer

    def connect(self, peer: Peer) -> None:
        """Have a connection to this process that works, as far as known.

        Raises:
            CommplaneError: the engine cannot make one, or could not a short while ago.
        """
        name = peer.identity.name
        if self.has(peer) and name not in self._stale:
            return
        if self._connected.pop(name, None) is not None:
            self._engine.disconnect(name)
        self._stale.discard(name)
        before = self._failures.get(name)
        began = self._clock()
        if before is not None and before.peer is peer and began < before.again:
            raise CommplaneError(before.why)
        try:
            self._engine.connect(name, peer.card.metadata)
        except CommplaneError as error:
            now = self._clock()
            self._failures[name] = _Failure(peer, str(error), now + _PAUSE * (now - began))
            raise
        self._failures.pop(name, None)
        self._connected[name] = peer

    def failed(self, peer: Peer) -> None:
        """A transfer to it did: it is connected to anew before the next."""
        if self.has(peer):
            self._stale.add(peer.identity.name)

    def up(self, peer: Peer) -> None:
        """It spoke to this end after it had been away: it may be tried at once."""
        self._failures.pop(peer.identity.name, None)

    def died(self, peer: Peer) -> None:
        """Its process has ended: what is under way to it ends, too."""
        self._failures.pop(peer.identity.name, None)
        if self.has(peer):
            del self._connected[peer.identity.name]
            self._engine.disconnect(peer.identity.name)
