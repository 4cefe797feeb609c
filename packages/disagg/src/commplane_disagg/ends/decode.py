"""The decode end: it tells prefill ranks where this rank's pages are, and knows when all of them have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from commplane.api.transfer import Moved
from commplane.errors import CommplaneError, ConfigError
from commplane_disagg.channel.messages import Abort, Ack, Drained, Failed, Message, Want, Written
from commplane_disagg.ends.end import End
from commplane_disagg.ends.peers import Peer
from commplane_disagg.ranks import Grid, holding, notifies
from commplane_disagg.rooms import Cause, Key, Reason, Room, Status

__all__ = ["Address", "DecodeEnd", "PrefillReplica"]


_FAREWELLS = 4096
"""Failed rooms that are remembered for a prefill rank that is not there."""


@dataclass(frozen=True)
class Address:
    """Where a prefill rank listens, and the name that it must answer with."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class PrefillReplica:
    """A prefill replica as the registry has it.

    Attributes:
        grid: its ranks.
        ranks: address of each rank, by its number in the grid.
    """

    grid: Grid
    ranks: Mapping[int, Address]

    def __post_init__(self) -> None:
        missing = sorted(set(range(self.grid.size)) - self.ranks.keys())
        if missing:
            raise ConfigError(f"prefill replica: {self.grid.size} ranks want an address, ranks {missing} have none")
        named: dict[str, list[int]] = {}
        for rank, address in sorted(self.ranks.items()):
            named.setdefault(address.name, []).append(rank)
        for name, ranks in named.items():
            if len(ranks) > 1:  # one of them would be waited for, and the others not
                raise ConfigError(f"prefill replica: ranks {ranks} are all named {name!r}; give each end a name of its own")


@dataclass(eq=False)
class _Sender:
    """One prefill rank of a room.

    Attributes:
        rank: its number in the prefill grid.
        peer: the process that was told where the pages are; None: nobody was, so nobody writes.
        written: it said that it has written everything.
        drained: it said that it writes no more for this failed room, and can promise it.
        poisoned: it said that it starts no more, and cannot promise that nothing lands of what it began.
        fenced: after that, this end's engine was told to let nothing in.
        told: it was told that the room failed, on this connection.
    """

    rank: int
    peer: Peer | None = None
    written: bool = False
    drained: bool = False
    poisoned: bool = False
    fenced: bool = False
    told: bool = False


@dataclass(eq=False)
class _Receiving:
    """What an open room holds."""

    pages: list[int]
    length: int
    grid: Grid
    senders: dict[str, _Sender] = field(default_factory=dict)


class DecodeEnd(End):
    """This rank's end of a decode replica. Arguments: see `End`; it does not listen.

    A room begins with `receive` on every rank of the replica, in the same order. Its pages are written by others until `step`
    reports them as released, be it after success or after a failure.
    """

    side = "decode"

    def _begin(self) -> None:
        self._dialled: dict[str, Address] = {}
        self._farewells: dict[str, deque[Abort]] = {}

    def receive(
        self,
        room: int,
        pages: Sequence[int],
        source: PrefillReplica,
        *,
        length: int | None = None,
        generation: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Have a room's pages written into this pool. Local; all ranks of the replica receive the same rooms in the same order.

        Args:
            room: its number, equal on both sides.
            pages: indices into this rank's pool, in the order of the request; where pages are dealt over cp, those of the
                positions that this rank holds.
            source: who writes them.
            length: pages of the whole request; may be left out unless pages are dealt.
            generation: above that of an earlier use of this number, equal on both sides.
            timeout: seconds until it fails unless it has succeeded.

        Raises:
            ConfigError: the two grids cannot serve each other.
            CommplaneError: the room is in use, this generation of it was, or a page is not free; nothing was begun.
        """
        mine = holding(self.card.kv, self.card.grid, self.card.rank)
        length = len(pages) if length is None and mine.every == 1 else length
        if length is None or len(pages) != len(range(mine.phase, length, mine.every)):
            raise CommplaneError(
                f"{self.name} room {room}: a request of {length} pages is dealt to {mine.every} cp ranks, and this one was given "
                f"{len(pages)}; give length= and the pages of positions {mine.phase}, {mine.phase + mine.every}, ..."
            )
        key = Key(room, generation)
        senders = notifies(self.card.kv, source.grid, self.card.grid, self.card.rank)
        self.ledger.lend(key, pages)
        try:
            found = self._open_room(room, generation, timeout)
        except CommplaneError:
            self.ledger.give_back(key)
            raise
        named = {source.ranks[rank].name: _Sender(rank) for rank in senders}
        found.data = _Receiving(list(pages), length, source.grid, named)
        found.advance(Status.BOOTSTRAPPING)
        for address in (source.ranks[rank] for rank in senders):
            if self._dialled.get(address.name) != address:
                self._dialled[address.name] = address
                self.channel.dial(address.name, address.host, address.port)
        self._tend(found, self._clock())

    def forget(self, source: PrefillReplica) -> None:
        """Connect to this replica no more; its open rooms fail."""
        for address in source.ranks.values():
            if self._dialled.pop(address.name, None) is not None:
                self.channel.forget(address.name)
                self._farewells.pop(address.name, None)

    def _up(self, peer: Peer) -> None:
        for farewell in self._farewells.pop(peer.identity.name, ()):
            self._send(peer, farewell)
        for room in list(self.table.rooms.values()):
            sender = _receiving(room).senders.get(peer.identity.name)
            if sender is None:
                continue
            if sender.peer is not None and sender.peer is not peer:
                if not sender.written:
                    self._fail(room, Reason.PEER_LOST, f"{peer.identity.name} was started again")
            elif room.is_failing:
                sender.told = False
                self._give_up(room)
            elif (
                room.local is Status.SUCCESS
            ):  # prefill may have ended the room: it is asked for nothing, and hears this at most twice
                self._send(peer, Ack(room.key.room, room.key.generation))
            else:
                self._want(room, sender, peer)
                self._tend(room, self._clock())

    def _want(self, room: Room, sender: _Sender, peer: Peer) -> None:
        refusal = self.card.refusal(peer.card)
        if refusal is None and (peer.card.grid, peer.card.rank) != (_receiving(room).grid, sender.rank):
            refusal = (
                f"it is rank {peer.card.rank} of {peer.card.grid}, the source says rank {sender.rank} of {_receiving(room).grid}"
            )
        if refusal is not None:
            self._fail(room, Reason.REFUSED, f"{peer.identity.name} and {self.name} do not fit: {refusal}")
            return
        receiving = _receiving(room)
        if self._send(peer, Want(room.key.room, room.key.generation, receiving.length, receiving.pages)):
            sender.peer = peer

    def _said(self, peer: Peer, message: Message) -> None:
        if not isinstance(message, Written | Failed | Drained):
            self.channel.cut(peer.identity.name, f"a {type(message).__name__.lower()} is not for a decode end")
            return
        key = Key(message.room, message.generation)
        room = self.table.get(key)
        sender = _receiving(room).senders.get(peer.identity.name) if room is not None else None
        if room is None or sender is None or sender.peer is not peer:
            self.late += 1
            if isinstance(message, Written) and self.table.ended(key):
                self._send(peer, Ack(key.room, key.generation))  # the first one was lost with its connection
            return
        if isinstance(message, Written):
            sender.written = True
            if room.local is Status.SUCCESS and not room.is_failing:
                self._send(peer, Ack(key.room, key.generation))
        elif isinstance(message, Drained):
            sender.drained, sender.poisoned = message.clean, not message.clean
            if sender.poisoned and self.fenced:
                self.engine.disconnect(peer.identity.name)
                sender.fenced = True
        else:
            reason = Reason(message.reason) if message.reason in Reason._value2member_map_ else Reason.ABORTED
            room.fail(Cause(reason, message.origin, message.text))
            sender.told = True
        self._tend(room, self._clock())

    def _moved(self, moved: Moved) -> None:
        raise CommplaneError(f"{self.name}: its engine ended transfer {moved.ticket}, and a decode end starts none")

    def _progress(self, room: Room) -> None:
        receiving = _receiving(room)
        for name, sender in receiving.senders.items():
            peer = self.peers.current(name)
            if sender.peer is None and peer is not None:
                self._want(room, sender, peer)
                if room.is_failing:
                    return
        senders = receiving.senders.values()
        if all(s.peer is not None for s in senders):
            room.advance(Status.WAITING)
        if any(s.written for s in senders):
            room.advance(Status.TRANSFERRING)
        if all(s.written for s in senders) and room.local is not Status.SUCCESS:
            room.advance(Status.SUCCESS)
            for sender in senders:
                if sender.peer is not None:
                    self._send(sender.peer, Ack(room.key.room, room.key.generation))

    def _give_up(self, room: Room) -> None:
        senders = _receiving(room).senders
        for name, sender in senders.items():
            peer = sender.peer or self.peers.current(name)
            if peer is not None and not sender.told and room.is_explained:
                sender.told = self._send(peer, self._farewell(room))
        open_ones = [s for s in senders.values() if not self._is_over(s)]
        room.drained = not open_ones
        room.stuck = bool(open_ones) and all(s.poisoned for s in open_ones)

    def _farewell(self, room: Room) -> Abort:
        cause, key = room.cause, room.key
        assert cause is not None
        return Abort(key.room, key.generation, cause.reason, cause.origin, cause.text[:500])

    def _is_over(self, sender: _Sender) -> bool:
        """Whether no write of this sender can land any more."""
        if sender.peer is None or sender.written or sender.drained:
            return True
        if sender.poisoned:  # it writes no more for this room; what it began is kept out
            return sender.fenced
        return sender.peer.dead and (self.quiet or self.fenced)

    def _lost(self, peer: Peer, why: str) -> None:
        for room in list(self.table.rooms.values()):
            sender = _receiving(room).senders.get(peer.identity.name)
            if sender is not None and sender.peer is peer and not sender.written:
                self._fail(room, Reason.PEER_LOST, f"{peer.identity.name} is lost: {why}")

    def _died(self, peer: Peer) -> None:
        # What it sent and this end's engine has not yet put into the pool must not land after its pages are given back.
        self.engine.disconnect(peer.identity.name)

    def _missing(self, room: Room) -> str:
        senders = _receiving(room).senders
        away = [f"{name} ({self.channel.trouble(name)})" for name, s in senders.items() if s.peer is None]
        if away:
            return f"not connected to {', '.join(away)}"
        return f"nothing was said of the end of the writes of {', '.join(name for name, s in senders.items() if not s.written)}"

    def _ended(self, room: Room) -> None:
        """A prefill rank that never heard of a failed room is told when it is there, so that it does not wait for nothing."""
        if room.cause is None:
            return
        for name, sender in _receiving(room).senders.items():
            if sender.peer is None and not sender.told:
                waiting = self._farewells.setdefault(name, deque(maxlen=_FAREWELLS))
                waiting.append(self._farewell(room))

    def _needed(self, peer: Peer) -> bool:
        rooms = self.table.rooms.values()
        return any(s.peer is peer for room in rooms for s in _receiving(room).senders.values())


def _receiving(room: Room) -> _Receiving:
    assert isinstance(room.data, _Receiving)
    return room.data
