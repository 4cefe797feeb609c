"""The prefill end: it writes this rank's pages into the pools of the decode ranks that want them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from commplane.api.transfer import Moved
from commplane.errors import CommplaneError
from commplane_disagg.channel import Identity
from commplane_disagg.channel.messages import Abort, Ack, Drained, Failed, Message, Want, Written
from commplane_disagg.ends.end import End
from commplane_disagg.ends.layout import copies
from commplane_disagg.ends.peers import Peer
from commplane_disagg.ends.reach import Reach
from commplane_disagg.ranks import Piece, holding, notified_by, sends
from commplane_disagg.rooms import Cause, Key, Reason, Room, Status

__all__ = ["PrefillEnd"]

_V = TypeVar("_V")

_EARLY = 1 << 14
"""Rooms that decode asked for or gave up before they were opened here, that are remembered."""


@dataclass(eq=False)
class _Receiver:
    """One decode rank of a room.

    Attributes:
        piece: what it gets; None for a rank that only tells this dummy of the room.
        begun: how many of this rank's pages were looked at for it.
        tickets: transfers that have not ended.
        unclean: a transfer ended badly on an engine that does not promise that it writes no more.
        written: it was told that everything is there.
        acked: it said that it has everything.
        told: it was told that the room failed.
        cancelled: its transfers were.
        drained: it was told that no write is under way.
    """

    peer: Peer
    want: Want
    piece: Piece | None
    begun: int = 0
    tickets: set[int] = field(default_factory=set)
    unclean: bool = False
    written: bool = False
    acked: bool = False
    told: bool = False
    cancelled: bool = False
    drained: bool = False


@dataclass(eq=False)
class _Sending:
    """What an open room holds: this rank's pages so far, whether these are all, and the decode ranks by number."""

    pages: list[int] = field(default_factory=list)
    complete: bool = False
    receivers: dict[int, _Receiver] = field(default_factory=dict)
    expected: tuple[int, ...] | None = None


class PrefillEnd(End):
    """This rank's end of a prefill replica. Arguments: see `End`.

    A room begins with `send` (or `open_room` before, so that both sides find each other while the prompt is computed) on every
    rank of the replica, in the same order. Pages given to `send` are read until `step` reports them as released. A room succeeds
    when every decode rank has said that everything it waits for has arrived.
    """

    side = "prefill"

    def _begin(self) -> None:
        self._wants: OrderedDict[Key, dict[str, tuple[Peer, Want]]] = OrderedDict()
        self._aborted: OrderedDict[Key, dict[Identity, tuple[int, Cause]]] = OrderedDict()
        self._tickets: dict[int, tuple[Room, _Receiver]] = {}
        self._reach = Reach(self.engine, self._clock)

    def open_room(self, room: int, *, generation: int = 0, timeout: float | None = None) -> None:
        """Take part in a room before its pages are there. Local; all ranks of the replica open the same rooms in the same order.

        Args:
            room: its number, equal on both sides.
            generation: above that of an earlier use of this number, equal on both sides.
            timeout: seconds until it fails unless it has succeeded.

        Raises:
            CommplaneError: the room is in use, or this generation of it was.
        """
        found = self._open_room(room, generation, timeout)
        found.data = _Sending()
        found.advance(Status.BOOTSTRAPPING)
        early = self._aborted.pop(found.key, {})
        wants = self._wants.pop(found.key, {})
        for key in [k for k in self._wants if k.room == room and k.generation < generation]:
            del self._wants[key]
        for peer, want in wants.values():
            self._attach(found, peer, want)
        for rank, cause in early.values():
            if self._may_give_up(found, rank):
                found.fail(cause)
        self._tend(found, self._clock())

    def send(
        self, room: int, pages: Sequence[int], *, last: bool = True, generation: int = 0, timeout: float | None = None
    ) -> None:
        """Give pages of a room to be written, in the order of the request; several times, as they are computed, or once.

        Local. The room is opened if it is not. Of a grid whose pages are dealt over cp, a rank gives those that it holds.

        Args:
            room: its number.
            pages: indices into this rank's pool, of the positions after those given before; the end's until they are released.
            last: there are no further ones.
            generation: see `open_room`.
            timeout: see `open_room`.

        Raises:
            CommplaneError: the room cannot be opened, was given its last page, or a page is not of this pool. A room that has
                failed takes the pages and gives them back.
        """
        key = Key(room, generation)
        found = self.table.get(key)
        if found is None:
            if not 0 <= min(pages, default=0) <= max(pages, default=0) < self.ledger.pages:
                raise CommplaneError(
                    f"{self.name} {key}: pages {list(pages)} are not all in the pool of {self.ledger.pages} pages"
                )
            self.open_room(room, generation=generation, timeout=timeout)
            found = self.table.rooms[room]
        sending = _sending(found)
        if sending.complete:
            raise CommplaneError(f"{self.name} {key}: it was given its last page already")
        self.ledger.lend(key, pages)
        sending.pages += pages
        sending.complete = last
        self._tend(found, self._clock())

    def _up(self, peer: Peer) -> None:
        # A decode end says again what it still wants; of a room that has ended there it says nothing, and its acknowledgement may
        # be lost. Both are asked for by saying again what was said.
        self._reach.up(peer)
        for room in list(self.table.rooms.values()):
            receiver = self._receiver(peer, room.key)
            if receiver is None or receiver.acked:
                continue
            if room.is_failing:
                receiver.told = receiver.drained = False
                self._give_up(room)
            else:
                receiver.written = False
                self._progress(room)

    def _said(self, peer: Peer, message: Message) -> None:
        if isinstance(message, Want):
            key = Key(message.room, message.generation)
            room = self.table.get(key)
            if room is not None:
                self._attach(room, peer, message)
            elif self.table.ended(key) is not None or peer.identity in self._aborted.get(key, {}):
                self._turn_away(peer, key, self.table.epitaph(key) or self._refusal("this generation of the room is over"))
            else:
                _remember(self._wants, key, self._wants.get(key, {})).update({peer.identity.name: (peer, message)})
        elif isinstance(message, Ack):
            receiver = self._receiver(peer, Key(message.room, message.generation))
            if receiver is None or not receiver.written:
                self.late += 1
                epitaph = self.table.epitaph(Key(message.room, message.generation))
                if epitaph is not None:  # it failed here, and that was lost
                    self._turn_away(peer, Key(message.room, message.generation), epitaph)
            else:
                receiver.acked = True
                self._tend(self.table.rooms[message.room], self._clock())
        elif isinstance(message, Abort):
            self._abort(peer, message)
        else:
            self.channel.cut(peer.identity.name, f"a {type(message).__name__.lower()} is not for a prefill end")

    def _abort(self, peer: Peer, message: Abort) -> None:
        key = Key(message.room, message.generation)
        room = self.table.get(key)
        cause = Cause(_reason(message.reason), message.origin, message.text)
        if room is None:
            wants = self._wants.get(key, {})
            if wants.pop(peer.identity.name, None) is not None and not wants:
                del self._wants[key]
            if self.table.ended(key) is None:
                _remember(self._aborted, key, self._aborted.get(key, {}))[peer.identity] = peer.card.rank, cause
            self._send(peer, Drained(key.room, key.generation, clean=True))
            return
        receiver = self._receiver(peer, key)
        if receiver is None:
            self._send(peer, Drained(key.room, key.generation, clean=True))
            if not self._may_give_up(room, peer.card.rank):
                return
        room.fail(cause)
        if receiver is not None:
            receiver.told = True
            receiver.drained = False
        self._give_up(room)

    def _may_give_up(self, room: Room, rank: int) -> bool:
        """Whether a decode rank that is no receiver may be one of the room's, and not of a replica that took the same number."""
        sending = _sending(room)
        return sending.expected is None or (rank in sending.expected and rank not in sending.receivers)

    def _attach(self, room: Room, peer: Peer, want: Want) -> None:
        sending, rank, key = _sending(room), peer.card.rank, room.key
        old = sending.receivers.get(rank)
        if old is not None and old.peer is not peer:
            self._turn_away(peer, key, self._refusal(f"decode rank {rank} of this room is {old.peer.identity.name} already"))
            if old.peer.identity.name == peer.identity.name:
                self._fail(room, Reason.PEER_LOST, f"{peer.identity.name} was started again")
            return
        if old is not None:  # said again after a reconnect: so is the answer
            old.told = old.drained = old.written = False
            if room.is_failing:
                self._give_up(room)
            else:
                self._progress(room)
            return
        if room.is_failing:
            sending.receivers[rank] = _Receiver(peer, want, None)
            self._give_up(room)
            return
        try:
            piece = self._piece(sending, peer)
        except CommplaneError as error:
            if sending.receivers:  # those that are there already do fit
                self._turn_away(peer, key, self._refusal(str(error)))
                return
            sending.receivers[rank] = _Receiver(peer, want, None)
            self._fail(room, Reason.REFUSED, str(error))
            return
        sending.receivers[rank] = _Receiver(peer, want, piece)
        self._tend(room, self._clock())

    def _piece(self, sending: _Sending, peer: Peer) -> Piece | None:
        card, theirs = self.card, peer.card
        refusal = theirs.refusal(card)
        if refusal is not None:
            raise CommplaneError(f"{peer.identity.name} and {self.name} do not fit: {refusal}")
        theirs.check()
        expected = notified_by(card.kv, card.grid, theirs.grid, card.rank)
        if (sending.expected is not None and sending.expected != expected) or theirs.rank not in expected:
            raise CommplaneError(
                f"{self.name} expects decode ranks {sending.expected or expected}, and {peer.identity.name} is rank "
                f"{theirs.rank} of {theirs.grid.size}; both sides must be given the same grids"
            )
        sending.expected = expected
        return next((p for p in sends(card.kv, card.grid, theirs.grid, card.rank) if p.receiver == theirs.rank), None)

    def _progress(self, room: Room) -> None:
        sending = _sending(room)
        if sending.expected is None or any(rank not in sending.receivers for rank in sending.expected):
            return
        room.advance(Status.WAITING)
        mine = holding(self.card.kv, self.card.grid, self.card.rank)
        for receiver in sending.receivers.values():
            if sending.complete and len(sending.pages) != len(range(mine.phase, receiver.want.length, mine.every)):
                self._fail(
                    room,
                    Reason.REFUSED,
                    f"decode wants {receiver.want.length} pages, of which this rank should hold "
                    f"{len(range(mine.phase, receiver.want.length, mine.every))}; it was given {len(sending.pages)}",
                )
                return
            try:
                self._submit(room, receiver, sending, mine.every, mine.phase)
            except CommplaneError as error:
                self._fail(room, Reason.ENGINE, f"to {receiver.peer.identity.name}: {error}")
                return
            if sending.complete and not receiver.tickets and not receiver.written:
                receiver.written = self._send(receiver.peer, Written(room.key.room, room.key.generation, receiver.begun))
        if all(r.acked for r in sending.receivers.values()):
            room.advance(Status.SUCCESS)

    def _submit(self, room: Room, receiver: _Receiver, sending: _Sending, every: int, phase: int) -> None:
        first, receiver.begun = receiver.begun, len(sending.pages)
        piece, theirs = receiver.piece, receiver.peer.card
        if piece is None or first == receiver.begun:
            return
        there = holding(theirs.kv, theirs.grid, theirs.rank)
        pairs = []
        for index in range(first, receiver.begun):
            position = index * every + phase
            if piece.has(position):
                place = (position - there.phase) // there.every
                if place >= len(receiver.want.pages):
                    raise CommplaneError(f"it gave {len(receiver.want.pages)} pages, and position {position} has none of them")
                pairs.append((sending.pages[index], receiver.want.pages[place]))
        if not pairs:
            return
        self._reach.connect(receiver.peer)
        local, remote, sizes = copies(self.card.layout, theirs.layout, piece.layers, piece.heads, pairs)
        ticket = self.engine.submit(receiver.peer.identity.name, local, remote, sizes)
        receiver.tickets.add(ticket)
        self._tickets[ticket] = room, receiver
        room.advance(Status.TRANSFERRING)

    def _moved(self, moved: Moved) -> None:
        room, receiver = self._tickets.pop(moved.ticket)
        receiver.tickets.discard(moved.ticket)
        if moved.error is not None:
            self._reach.failed(receiver.peer)
            receiver.unclean = receiver.unclean or not self.quiet
            self._fail(room, Reason.ENGINE, f"to {receiver.peer.identity.name}: {moved.error}")
        self._tend(room, self._clock())

    def _give_up(self, room: Room) -> None:
        sending, key, cause = _sending(room), room.key, room.cause
        assert cause is not None
        for receiver in sending.receivers.values():
            if not receiver.told and room.is_explained:
                failed = Failed(key.room, key.generation, cause.reason, cause.origin, cause.text[:500])
                receiver.told = self._send(receiver.peer, failed)
            # Without the promise that a cancelled transfer writes nothing later it is better to let it end.
            if self.quiet and not receiver.cancelled:
                receiver.cancelled = True
                for ticket in receiver.tickets:
                    self.engine.cancel(ticket)
            if receiver.told and not receiver.tickets and not receiver.drained:
                receiver.drained = self._send(receiver.peer, Drained(key.room, key.generation, clean=not receiver.unclean))
        rest = list(sending.receivers.values())
        # A peer whose process has ended has no memory that a write could land in.
        room.drained = not any(r.tickets or (r.unclean and not r.peer.dead) for r in rest)
        room.stuck = not room.drained and not any(r.tickets for r in rest)

    def _lost(self, peer: Peer, why: str) -> None:
        for room in list(self.table.rooms.values()):
            receiver = self._receiver(peer, room.key)
            if receiver is not None and not receiver.acked and not room.is_failing:
                self._fail(room, Reason.PEER_LOST, f"{peer.identity.name} is lost: {why}")

    def _died(self, peer: Peer) -> None:
        self._reach.died(peer)
        for key, wants in list(self._wants.items()):
            if wants.pop(peer.identity.name, None) is not None and not wants:
                del self._wants[key]

    def _missing(self, room: Room) -> str:
        sending = _sending(room)
        if sending.expected is None:
            return "no decode rank asked for it"
        away = [rank for rank in sending.expected if rank not in sending.receivers]
        if away:
            return f"decode ranks {away} did not ask for it"
        if not sending.complete:
            return f"{len(sending.pages)} pages were given and not the last one"
        moving = [r.peer.identity.name for r in sending.receivers.values() if r.tickets]
        if moving:
            return f"writes to {', '.join(moving)} have not ended"
        return f"{', '.join(r.peer.identity.name for r in sending.receivers.values() if not r.acked)} did not acknowledge"

    def _ended(self, room: Room) -> None:
        """Tickets of a released room have ended; nothing is left to forget."""

    def _needed(self, peer: Peer) -> bool:
        if self._reach.has(peer) or any(peer.identity.name in wants for wants in self._wants.values()):
            return True
        return any(self._receiver(peer, room.key) is not None for room in self.table.rooms.values())

    def _receiver(self, peer: Peer, key: Key) -> _Receiver | None:
        room = self.table.get(key)
        receiver = _sending(room).receivers.get(peer.card.rank) if room is not None else None
        return receiver if receiver is not None and receiver.peer is peer else None

    def _refusal(self, why: str) -> Cause:
        return Cause(Reason.REFUSED, self.name, why)

    def _turn_away(self, peer: Peer, key: Key, cause: Cause) -> None:
        self._send(peer, Failed(key.room, key.generation, cause.reason, cause.origin, cause.text[:500]))
        self._send(peer, Drained(key.room, key.generation, clean=True))


def _sending(room: Room) -> _Sending:
    assert isinstance(room.data, _Sending)
    return room.data


def _reason(number: int) -> Reason:
    return Reason(number) if number in Reason._value2member_map_ else Reason.ABORTED


def _remember(table: OrderedDict[Key, _V], key: Key, value: _V) -> _V:
    table[key] = value
    table.move_to_end(key)
    while len(table) > _EARLY:
        table.popitem(last=False)
    return value
