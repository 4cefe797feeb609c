"""A network and an engine that exist only in a seed: messages and bytes come late, connections break, processes stop and die."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from commplane.api.transfer import Moved, TransferContext, TransferEngine
from commplane.errors import CommplaneError
from commplane_disagg.channel import Down, Event, Identity, Said, Up


class Network:
    """Who is there, what is under way, and what time it is.

    Attributes:
        landed: called with the engine, offset and bytes of every piece that is about to land.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.channels: dict[str, SimChannel] = {}
        self.engines: dict[str, SimEngine] = {}
        self.dead: set[str] = set()
        self.seen_dead: set[str] = set()
        self.instances = 0
        self.flights: list[Flight] = []
        self.landed: Callable[[SimEngine, int, bytes], None] = lambda *_: None

    def clock(self) -> float:
        return self.now

    def has_ended(self, identity: Identity) -> bool:
        """Proof of death, which is not there at once, and never for some."""
        return identity.instance in self.seen_dead

    def latency(self) -> float:
        return self.random.choice((0.0, 0.02, 0.1, 0.5)) * self.random.random()

    def advance(self, seconds: float) -> None:
        """Let time pass: bytes land in the order of their times."""
        self.now += seconds
        for flight in sorted(self.flights, key=lambda f: f.at):
            if flight.at <= self.now and flight in self.flights:  # an earlier one may have ended the others of its ticket
                self.flights.remove(flight)
                flight.land()

    def kill(self, name: str) -> None:
        """The process with this channel is no more; of its bytes, what the engine had begun may still land if it is not quiet."""
        channel = self.channels.pop(name)
        self.dead.add(channel.identity.instance)
        channel.is_dead = True
        for wire in list(channel.wires.values()):
            wire.cut(channel)
        engine = self.engines.pop(channel.identity.instance)
        engine.stop()


class Wire:
    """One connection: what is on its way to each end, in order."""

    def __init__(self, network: Network, dialer: SimChannel, acceptor: SimChannel) -> None:
        self.network = network
        self.ends = (dialer, acceptor)
        self.queues: dict[int, deque[tuple[float, Any]]] = {id(dialer): deque(), id(acceptor): deque()}
        self.open = True
        self.put(acceptor, "up")

    def other(self, end: SimChannel) -> SimChannel:
        return self.ends[1] if end is self.ends[0] else self.ends[0]

    def put(self, to: SimChannel, item: Any) -> None:
        queue = self.queues[id(to)]
        at = self.network.now + self.network.latency()
        queue.append((max(at, queue[-1][0]) if queue else at, item))

    def cut(self, by: SimChannel | None) -> None:
        """Close it: the other end reads what is on its way, or only some of it if the network broke."""
        if not self.open:
            return
        self.open = False
        for end in self.ends:
            queue = self.queues[id(end)]
            if end is by:
                queue.clear()
            elif by is None:
                for _ in range(self.network.random.randint(0, len(queue))):
                    queue.pop()
            queue.append((0.0, "down"))


class SimChannel:
    """Stands in for `commplane_disagg.channel.Channel`."""

    def __init__(self, network: Network, name: str, card: bytes) -> None:
        network.instances += 1
        self.network = network
        self.identity = Identity(name=name, instance=f"i{network.instances}", machine="m", pid=network.instances, started=1)
        self.card, self.refused = card, []
        self.targets: dict[str, float] = {}
        self.wires: dict[str, Wire] = {}
        self.up: dict[str, Wire] = {}
        self.peers: dict[int, SimChannel] = {}
        self.is_dead = False
        self.address = ("sim", 1)
        network.channels[name] = self

    def is_up(self, name: str) -> bool:
        return name in self.up

    def trouble(self, name: str) -> str:
        return f"{name} does not answer"

    def dial(self, name: str, host: str, port: int) -> None:
        self.targets.setdefault(name, 0.0)

    def forget(self, name: str) -> None:
        self.targets.pop(name, None)
        self.cut(name, "")

    def cut(self, name: str, why: str) -> None:
        assert why == "", why
        if name in self.wires:
            self.wires[name].cut(self)

    def send(self, name: str, message: Any) -> bool:
        wire = self.up.get(name)
        if wire is None or not wire.open:
            return False
        wire.put(wire.other(self), message)
        return True

    def poll(self, timeout: float = 0.0) -> list[Event]:
        events: list[Event] = []
        for name, again in self.targets.items():
            there = self.network.channels.get(name)
            if name not in self.wires and there is not None and self.network.now >= again:
                self.targets[name] = self.network.now + 0.3
                wire = Wire(self.network, self, there)
                self.wires[name] = wire
                there.offered(self.identity.name, wire)
        for wire in list({id(w): w for w in [*self.wires.values(), *self.up.values()]}.values()):
            self.read(wire, events)
        return events

    def offered(self, name: str, wire: Wire) -> None:
        """Somebody dials: an older connection of that name is over once this one is read."""
        old = self.wires.get(name)
        if old is not None:
            old.cut(self)
            self.pending = getattr(self, "pending", [])
            self.pending.append(old)
        self.wires[name] = wire

    def read(self, wire: Wire, events: list[Event]) -> None:
        for old in getattr(self, "pending", []):
            if old is not wire and id(old) in self.peers:
                self.gone(old, events)
        self.pending: list[Wire] = []
        queue = wire.queues[id(self)]
        other = wire.other(self)
        while queue and queue[0][0] <= self.network.now:
            _, item = queue.popleft()
            if item == "up":
                self.peers[id(wire)] = other
                self.up[other.identity.name] = wire
                events.append(Up(other.identity, other.card))
                if self is wire.ends[1] and wire.open:
                    wire.put(other, "up")
            elif item == "down":
                self.gone(wire, events)
                return
            elif id(wire) in self.peers:
                events.append(Said(other.identity, item))

    def gone(self, wire: Wire, events: list[Event]) -> None:
        other = wire.other(self)
        name = other.identity.name
        if self.up.get(name) is wire:
            del self.up[name]
        if self.wires.get(name) is wire:
            del self.wires[name]
        if self.peers.pop(id(wire), None) is not None:
            events.append(Down(other.identity, "the connection broke"))

    def close(self) -> None:
        """Only for what the base class wants; processes of a world are killed."""


class Flight:
    """One piece on its way."""

    def __init__(self, engine: SimEngine, ticket: int, peer: str, at: float, source: int, target: int, size: int) -> None:
        self.engine, self.ticket, self.peer, self.at = engine, ticket, peer, at
        self.source, self.target, self.size = source, target, size

    def land(self) -> None:
        there = self.engine.network.engines.get(self.peer)
        if there is None:
            self.engine.end(self.ticket, "the peer's process has ended")
            return
        data = bytes(self.engine.memory[self.source : self.source + self.size])
        self.engine.network.landed(there, self.target, data)
        there.memory[self.target : self.target + self.size] = data
        self.engine.arrived(self.ticket)


class SimEngine(TransferEngine):
    """Bytes that take their time. Quiet: what has ended is off the wire. Not quiet: it may land long after."""

    def __init__(self, network: Network, *, quiet: bool, faults: float) -> None:
        self.network, self.quiet, self.faults = network, quiet, faults
        self.peers: dict[str, str] = {}
        self.open_pieces: dict[int, int] = {}
        self.of_peer: dict[int, str] = {}
        self.ended: list[Moved] = []
        self.tickets = 0
        self.instance = ""

    def open(self, context: TransferContext) -> None:
        self.name = context.name

    def register(self, pool: memoryview) -> None:
        self.memory = pool

    def metadata(self) -> bytes:
        return f"i{self.network.instances + 1}".encode()  # of the channel that is made next

    def connect(self, peer: str, metadata: bytes) -> None:
        self.peers[peer] = metadata.decode()

    def submit(self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int]) -> int:
        if peer not in self.peers:
            raise CommplaneError(f"{peer} is not connected")
        self.tickets += 1
        sizes = [nbytes] * len(local) if isinstance(nbytes, int) else nbytes
        self.open_pieces[self.tickets], self.of_peer[self.tickets] = len(local), peer
        late = self.network.random.choice((0.0, 0.1, 4.0))
        for here, there, size in zip(local, remote, sizes, strict=True):
            at = self.network.now + late * self.network.random.random()
            self.network.flights.append(Flight(self, self.tickets, self.peers[peer], at, here, there, size))
        if self.network.random.random() < self.faults:
            self.end(self.tickets, "the engine lost its connection")
        return self.tickets

    def arrived(self, ticket: int) -> None:
        if ticket in self.open_pieces:
            self.open_pieces[ticket] -= 1
            if not self.open_pieces[ticket]:
                self.end(ticket, None)

    def end(self, ticket: int, error: str | None) -> None:
        if self.open_pieces.pop(ticket, None) is not None:
            self.ended.append(Moved(ticket, error))
            if self.quiet:
                self.network.flights = [f for f in self.network.flights if f.engine is not self or f.ticket != ticket]

    def poll(self, timeout: float = 0.0) -> list[Moved]:
        ended, self.ended = self.ended, []
        return ended

    def cancel(self, ticket: int) -> None:
        self.end(ticket, "cancelled")

    def disconnect(self, peer: str) -> None:
        self.peers.pop(peer, None)
        for ticket in [t for t, p in self.of_peer.items() if p == peer and t in self.open_pieces]:
            self.end(ticket, "disconnected")

    def stop(self) -> None:
        """The process dies."""
        if self.quiet:
            self.network.flights = [f for f in self.network.flights if f.engine is not self]
        else:
            for flight in self.network.flights:
                if flight.engine is self:
                    flight.at += self.network.random.random() * 5

    def close(self) -> None:
        self.stop()
