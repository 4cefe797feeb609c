"""Who is there on the other side: since when somebody is away, and who is proved to be dead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from commplane_disagg.channel import Identity, has_ended
from commplane_disagg.ends.card import Card

__all__ = ["Peer", "Peers"]

_LOOK = 0.1
"""Seconds between two looks at whether a process that is away has ended."""

_ASK = 1.0
"""Seconds between two questions to others about it."""


@dataclass
class Peer:
    """One process on the other side.

    Attributes:
        identity: which one.
        card: what it said of itself.
        away_since: when its connection broke, or None while it is up.
        why: the connection broke.
        dead: proved: it writes no more, because its process has ended, or its end has and it said so.
    """

    identity: Identity
    card: Card
    away_since: float | None = None
    why: str = ""
    dead: bool = False
    looked: float = field(default=0.0, repr=False)
    asked: float = field(default=0.0, repr=False)


class Peers:
    """All processes that were ever up, by name and instance, until nobody asks for them any more.

    Args:
        has_ended: whether a process is proved to be gone, as far as can be seen from here.
    """

    def __init__(self, has_ended: Callable[[Identity], bool] = has_ended) -> None:
        self._has_ended = has_ended
        self._known: dict[tuple[str, str], Peer] = {}
        self._now: dict[str, Peer] = {}

    def up(self, identity: Identity, card: Card) -> Peer:
        """It connected, for the first time or again; another instance of that name is away from now on."""
        key = identity.name, identity.instance
        peer = self._known.setdefault(key, Peer(identity, card))
        peer.card, peer.away_since = card, None
        self._now[identity.name] = peer
        return peer

    def down(self, identity: Identity, why: str, now: float) -> Peer | None:
        """Its connection broke."""
        peer = self._known.get((identity.name, identity.instance))
        if peer is not None and peer.away_since is None:
            peer.away_since, peer.why = now, why
        if self._now.get(identity.name) is peer:
            self._now.pop(identity.name, None)
        return peer

    def current(self, name: str) -> Peer | None:
        """Who is up under this name."""
        return self._now.get(name)

    def find(self, identity: Identity) -> Peer | None:
        """That process."""
        return self._known.get((identity.name, identity.instance))

    def declare_dead(self, name: str, instance: str | None) -> list[Peer]:
        """Somebody who knows says so: of one instance, or of all of this name that are away."""
        dead = [p for p in self._known.values() if p.identity.name == name and p.away_since is not None and not p.dead]
        dead = [p for p in dead if instance is None or p.identity.instance == instance]
        for peer in dead:
            peer.dead = True
        return dead

    def look(self, now: float) -> list[Peer]:
        """Those that are away and were just found dead, as far as this machine can tell."""
        found = []
        for peer in self._known.values():
            if peer.away_since is not None and not peer.dead and now - peer.looked >= _LOOK:
                peer.looked = now
                if self._has_ended(peer.identity):
                    peer.dead = True
                    found.append(peer)
        return found

    def witnesses(self, now: float) -> list[tuple[Peer, Peer]]:
        """Who is to be asked about whom: (one that is up on the same machine, one that is away and not proved to be dead)."""
        out = []
        for peer in self._known.values():
            if peer.away_since is None or peer.dead or not peer.identity.machine or now - peer.asked < _ASK:
                continue
            peer.asked = now
            witness = next((p for p in self._now.values() if p.identity.machine == peer.identity.machine), None)
            if witness is not None:
                out.append((witness, peer))
        return out

    def testified(self, witness: Peer, pid: int, started: int) -> list[Peer]:
        """A peer says that a process of its own machine has ended: which of those that are away that was."""
        dead = [p for p in self._known.values() if (p.identity.pid, p.identity.started) == (pid, started)]
        dead = [p for p in dead if p.identity.machine == witness.identity.machine and p.away_since is not None and not p.dead]
        for peer in dead:
            peer.dead = True
        return dead

    def keep(self, needed: Callable[[Peer], bool]) -> None:
        """Forget those that are away and that no room waits for."""
        gone = [key for key, peer in self._known.items() if peer.away_since is not None and not needed(peer)]
        for key in gone:
            del self._known[key]

    def away(self) -> list[Peer]:
        """Those whose connection is broken."""
        return [p for p in self._known.values() if p.away_since is not None]
