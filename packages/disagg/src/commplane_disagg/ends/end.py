"""What a prefill end and a decode end share: the channel, the engine, the table of rooms and one step of all three."""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from commplane.api import Agreed, SyncRound
from commplane.api.transfer import Moved, TransferContext, TransferEngine
from commplane.errors import CommplaneError, PeerError, UnsupportedOperation
from commplane_disagg.channel import Channel, Down, Event, Identity, Said, Up, bind, has_ended
from commplane_disagg.channel.messages import MOST_NUMBER, Ended, Inquire, Message
from commplane_disagg.ends.card import Card, decode_card, encode_card
from commplane_disagg.ends.layout import KvLayout
from commplane_disagg.ends.peers import Peer, Peers
from commplane_disagg.ends.report import LentPages, Report, RoomResult
from commplane_disagg.ranks import Grid, Kv
from commplane_disagg.rooms import Cause, Key, PageLedger, Reason, Room, RoomTable, Status

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["End"]


class End(ABC):
    """One rank's end of all transfers to the other side. One thread drives it, by `step` once in every step of the scheduler.

    Args:
        name: unique among all ends that may meet, such as ``"prefill-0/dp0/cp0/tp1/pp0"``; peers dial and check it.
        instance: of this process, as in the registry's row; None: a new random one.
        kv: the model's cache, equal on both sides.
        grid: the ranks of this replica.
        rank: this rank's number in `grid`.
        layout: of this rank's pool; must hold the layers and heads that the grid gives this rank.
        engine: a transfer engine, not opened; the end opens and closes it.
        engine_name: of its `TransferSpec`; compared with the peer's.
        capabilities: of its `TransferSpec`; with neither ``"quiet"`` nor ``"fenced"``, pages of a transfer that failed are
            quarantined for good.
        engine_options: settings of the engine.
        rounds: a sync round over all ranks of the replica that has ``disagg_rooms`` and no other field, made by
            ``plane.sync_round``; None where the replica is one rank, or the engine runs the round itself (`votes`, `settle`).
        token: shared by all ends and the registry; None switches authentication off.
        host: address that peers reach; listened on by a prefill end.
        port: to listen on; 0 takes a free one. A decode end does not listen.
        listener: a bound and listening socket to use instead; the end owns it from then on.
        timeout: seconds that a room may take, unless it is given its own.
        drain_timeout: seconds that a failed room may drain before its pages are shown as quarantined. They are not freed by that.
        lost_after: seconds that a broken connection may take to come back before its rooms fail.
        beat: seconds after which a quiet end says that it is there.
        silence: seconds without a byte after which a peer's connection is given up. A scheduler that does not call `step` for so
            long is lost to its peers.
        connect_timeout: seconds that connecting may take, of the channel, which nobody waits for, and of the engine, which the
            `step` waits for in which the first page goes to a new peer.
        clock: seconds, monotonic.
        has_ended: whether a process of this machine is proved to be gone.
    """

    side = ""

    def __init__(
        self,
        *,
        name: str,
        instance: str | None = None,
        kv: Kv,
        grid: Grid,
        rank: int,
        layout: KvLayout,
        engine: TransferEngine,
        engine_name: str,
        capabilities: Sequence[str] | frozenset[str] = (),
        engine_options: dict[str, Any] | None = None,
        rounds: SyncRound | None = None,
        token: bytes | None,
        host: str = "127.0.0.1",
        port: int = 0,
        listener: socket.socket | None = None,
        timeout: float = 120.0,
        drain_timeout: float = 10.0,
        lost_after: float = 5.0,
        beat: float = 1.0,
        silence: float = 15.0,
        connect_timeout: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        has_ended: Callable[[Identity], bool] = has_ended,
    ) -> None:
        self.name, self.host, self.engine = name, host, engine
        self.quiet, self.fenced = "quiet" in capabilities, "fenced" in capabilities
        self._rounds, self._token, self._clock, self._has_ended = rounds, token, clock, has_ended
        self._instance, self._port, self._listener, self._options = instance, port, listener, engine_options or {}
        self._timeout, self._drain_timeout, self._lost_after = timeout, drain_timeout, lost_after
        self._beat, self._silence, self._connect_timeout = beat, silence, connect_timeout
        self.card = Card(side=self.side, kv=kv, grid=grid, rank=rank, layout=layout, engine=engine_name)
        self.card.check()
        group_rank, group_size = (rounds.rank, rounds.world_size) if rounds is not None else (rank, grid.size)
        self.table = RoomTable(group_rank, group_size, f"{self.side} rank {rank}/{grid.size}")
        self.ledger = PageLedger(layout.pages, shared=self.side == "prefill")
        self.peers = Peers(has_ended)
        self.late = 0
        self._channel: Channel | None = None
        self._deadlines: dict[Key, float] = {}
        self._drain_until: dict[Key, float] = {}
        self._aborts: dict[Key, str] = {}
        self._closed = False
        self._begin()

    # What an engine calls.

    def open(self, pool: memoryview | None = None) -> memoryview:
        """Bind, open the transfer engine and name its pool. Local; afterwards this end may be registered.

        Args:
            pool: writable memory of at least ``layout.nbytes``, which outlives this end; None: the engine's own.

        Returns:
            The pool.

        Raises:
            ConfigError: the address cannot be bound, or the pool is too small.
            CommplaneError: the engine cannot work here.
        """
        if self._channel is not None:
            raise CommplaneError(f"{self.name}: is open already")
        listener = self._listener
        if listener is None and self.side == "prefill":
            listener = bind(self.host, self._port)
        try:
            context = TransferContext(self.name, self.host, self._connect_timeout, self._options)
            self.engine.open(context)
            pool = self.engine.allocate(self.card.layout.nbytes) if pool is None else pool
            if pool.nbytes < self.card.layout.nbytes:
                raise UnsupportedOperation(
                    f"{self.name}: the layout wants {self.card.layout.nbytes} bytes, the pool has {pool.nbytes}"
                )
            self.engine.register(pool)
            self.card = msgspec.structs.replace(self.card, metadata=self.engine.metadata())
            self._channel = self._make_channel(listener)
        except BaseException:
            if listener is not None:
                listener.close()
            self.engine.close()
            raise
        return pool

    @property
    def channel(self) -> Channel:
        """The channel, once open."""
        if self._channel is None or self._closed:
            raise CommplaneError(f"{self.name}: is not open")
        return self._channel

    @property
    def identity(self) -> Identity:
        """Name, instance and process of this end."""
        return self.channel.identity

    @property
    def port(self) -> int:
        """That is listened on; 0 for a decode end."""
        address = self.channel.address
        return address[1] if address is not None else 0

    def step(self, timeout: float = 0.0) -> Report:
        """Messages, completions, deadlines and one sync round: once in every step of the scheduler, on all ranks of the replica.

        Collective over the replica. Does not wait for the other side; `timeout` is how long it may wait for a first message.

        Raises:
            MismatchError: the ranks of the replica opened different rooms, or are at different steps.
            PeerError: a rank of the replica is missing in the round, or did not open a room that this rank did, `lost_after` past
                its deadline.
        """
        votes = self.votes(timeout)
        agreed: Agreed
        if self._rounds is None:
            if self.table.world_size > 1:
                raise UnsupportedOperation(
                    f"{self.name}: a replica of {self.table.world_size} ranks wants rounds=, or votes and settle"
                )
            agreed = {name: value if isinstance(value, int) else tuple(value) for name, value in votes.items()}
        else:
            agreed = self._rounds.step(votes, digest=self.table.digest)
        return self.settle(agreed)

    def votes(self, timeout: float = 0.0) -> dict[str, int | Sequence[int]]:
        """The local half of `step`, for engines that have one round for everything: this rank's values of ``disagg_rooms``.

        Every `votes` is followed by a `settle` with what was agreed, also if that comes a step later. ``table.digest`` goes into
        the round's digest.
        """
        self._look_for_others()
        # Not earlier: what was given to the last round could have been the success of the room, and peers may know.
        for key, why in self._aborts.items():
            given_up = self.table.get(key)
            if given_up is not None:
                self._fail(given_up, Reason.ABORTED, why)
        self._aborts.clear()
        for event in self.channel.poll(timeout):
            self._event(event)
        for moved in self.engine.poll(0.0):
            self._moved(moved)
        now = self._clock()
        for peer in self.peers.look(now):
            self._bury(peer)
        for witness, peer in self.peers.witnesses(now):
            self._send(witness, Inquire(peer.identity.pid, peer.identity.started))
        for peer in self.peers.away():
            if peer.away_since is not None and now - peer.away_since >= self._lost_after:
                self._lost(peer, peer.why)
        for room in list(self.table.rooms.values()):
            # What goes well moves by events alone, so that a step costs little however many rooms wait.
            if room.is_failing:
                self._tend(room, now)
            elif now >= self._deadlines[room.key] and room.local < Status.SUCCESS:
                # Only here, when all that had come was heard. A rank that has everything has told its peers so: it waits for the
                # others of its group, which have deadlines of their own.
                self._fail(room, Reason.TIMEOUT, f"its deadline passed; {self._missing(room)}")
        self.peers.keep(self._needed)
        return self.table.votes()

    def settle(self, agreed: Agreed) -> Report:
        """The other half of `step`: what the round agreed on. Local."""
        report = Report()
        for change in self.table.settle(agreed):
            room, key = change.room, change.room.key
            if self._rounds is not None:
                self._rounds.note(f"room {change.kind}", key.room, key.generation)
            if change.kind == "failed":
                self._tend(room, self._clock())
            elif change.kind == "success":
                report.results.append(RoomResult(key.room, key.generation))
            elif change.kind == "error":
                report.results.append(RoomResult(key.room, key.generation, room.error))
                self._give_up(room)  # now peers can be told why
            elif change.kind == "quarantined":
                report.quarantined.append(LentPages(key.room, key.generation, self.ledger.lent(key)))
            elif change.kind == "released":
                self._deadlines.pop(key, None)
                self._drain_until.pop(key, None)
                self._ended(room)
                report.released.append(LentPages(key.room, key.generation, self.ledger.give_back(key)))
        return report

    def abort(self, room: int, *, generation: int = 0, why: str = "the engine gave it up") -> None:
        """Give a room up on this rank, and so on all ranks of both sides. Local, at any time; a room that has ended stays ended.

        The room fails with the next step, unless the ranks were about to agree that it succeeded; its pages come back as those of
        any failed room.
        """
        found = self.table.get(Key(room, generation))
        if found is not None:
            self._aborts[found.key] = why

    def status(self, room: int, *, generation: int = 0) -> Status | None:
        """What the group agreed on; None for a room that is not known, or was released."""
        found = self.table.get(Key(room, generation))
        return found.status if found is not None else None

    def peer_died(self, name: str, instance: str | None = None) -> int:
        """Somebody who knows for sure says that a peer's process runs no more, such as who runs the machine it was on.

        Pages that only its writes kept in quarantine come back. Of one instance, or of all of that name that are not connected.

        Returns:
            How many processes that were.
        """
        dead = self.peers.declare_dead(name, instance)
        for peer in dead:
            self._bury(peer)
        return len(dead)

    def stats(self) -> dict[str, int]:
        """For metrics: rooms now and pages that are lent out or quarantined, and counts since the start."""
        quarantined = self.table.quarantined()
        return {
            "rooms": len(self.table.rooms),
            "pages_lent": len(self.ledger),
            "rooms_quarantined": len(quarantined),
            "pages_quarantined": sum(self.ledger.held(room.key) for room in quarantined),
            "peers_away": len(self.peers.away()),
            "late_messages": self.late,
            **{f"{name}_total": count for name, count in self.table.counts.items()},
        }

    def close(self) -> None:
        """End all transfers and connections. Local, idempotent. Open rooms are not waited for; peers see this end leave."""
        if self._closed:
            return
        self._closed = True
        if self._channel is not None:
            self.engine.close()  # before the channel: who hears that this end left may rely on that it writes no more
            self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What the two sides do differently.

    @abstractmethod
    def _begin(self) -> None:
        """Set up what this side keeps."""

    @abstractmethod
    def _up(self, peer: Peer) -> None:
        """A peer is there, for the first time or again: say again what it has to know."""

    @abstractmethod
    def _said(self, peer: Peer, message: Message) -> None:
        """A message of a peer."""

    @abstractmethod
    def _moved(self, moved: Moved) -> None:
        """A transfer of this end ended."""

    @abstractmethod
    def _lost(self, peer: Peer, why: str) -> None:
        """A peer is away for too long, or dead: fail its rooms. Called in each step as long as that is so."""

    @abstractmethod
    def _died(self, peer: Peer) -> None:
        """A peer was just proved to be dead, and its rooms have failed."""

    @abstractmethod
    def _progress(self, room: Room) -> None:
        """Bring a room forward that has not failed here. Called after everything that may let it move, not in each step."""

    @abstractmethod
    def _give_up(self, room: Room) -> None:
        """Bring a failed room forward: tell peers, wait for its writes; set `drained` or `stuck`."""

    @abstractmethod
    def _missing(self, room: Room) -> str:
        """What a room waits for, for the error of its deadline."""

    @abstractmethod
    def _ended(self, room: Room) -> None:
        """A room is gone."""

    @abstractmethod
    def _needed(self, peer: Peer) -> bool:
        """Whether some room still waits for something of a peer that is away."""

    # What they share.

    def _make_channel(self, listener: socket.socket | None) -> Channel:
        return Channel(
            self.name,
            instance=self._instance,
            token=self._token,
            listener=listener,
            card=encode_card(self.card),
            beat=self._beat,
            silence=self._silence,
            handshake=self._connect_timeout,
            clock=self._clock,
        )

    def _open_room(self, room: int, generation: int, timeout: float | None) -> Room:
        for what, number in (("room", room), ("generation", generation)):
            if not 0 <= number <= MOST_NUMBER:  # the peer could not read it, and would break the connection of all rooms
                raise CommplaneError(f"{self.name} room {room}: {what} {number} cannot be sent, wanted 0 to {MOST_NUMBER}")
        found = self.table.open(Key(room, generation))
        self._deadlines[found.key] = self._clock() + (self._timeout if timeout is None else timeout)
        return found

    def _look_for_others(self) -> None:
        """Nothing can be agreed on about a room that another rank of the replica does not open."""
        now = self._clock()
        for room in self.table.alone():
            late = now - self._deadlines[room.key]
            if late >= self._lost_after:
                raise PeerError(
                    f"{self.name} {room.key} is open on this rank, and not on all ranks of the replica {late:.1f} s after its "
                    f"deadline; open the same rooms in the same order on every rank, and start the replica again"
                )

    def _fail(self, room: Room, reason: Reason, text: str, origin: str | None = None) -> None:
        if room.fail(Cause(reason, origin or self.name, text)):
            self._tend(room, self._clock())

    def _tend(self, room: Room, now: float) -> None:
        if room.status is Status.RELEASED:
            return
        if not room.is_failing:
            self._progress(room)
        if room.is_failing and not room.drained:
            until = self._drain_until.setdefault(room.key, now + self._drain_timeout)
            self._give_up(room)
            room.stuck = room.stuck or now >= until

    def _event(self, event: Event) -> None:
        if isinstance(event, Up):
            try:
                card = decode_card(event.card)
            except CommplaneError as error:
                self.channel.cut(event.peer.name, str(error))
                return
            current = self.peers.current(event.peer.name)
            if current is not None and current.identity.instance != event.peer.instance:
                self.peers.down(current.identity, "another instance took its place", self._clock())
            self._up(self.peers.up(event.peer, card))
        elif isinstance(event, Down):
            away = self.peers.down(event.peer, event.why, self._clock())
            if event.ended and away is not None and not away.dead:
                away.dead = True
                self._bury(away)
        elif isinstance(event, Said):
            peer = self.peers.find(event.peer)
            if peer is None:
                return
            if isinstance(event.message, Inquire):
                self._testify(peer, event.message)
            elif isinstance(event.message, Ended):
                for dead in self.peers.testified(peer, event.message.pid, event.message.started):
                    self._bury(dead)
            else:
                self._said(peer, event.message)

    def _bury(self, peer: Peer) -> None:
        """A peer was just proved to be dead: its rooms fail for that, before its transfers end for it."""
        self._lost(peer, f"{peer.why}, and it has ended")
        self._died(peer)

    def _testify(self, peer: Peer, question: Inquire) -> None:
        """Answer a peer on another machine that cannot see whether a process of this machine has ended."""
        identity = msgspec.structs.replace(self.identity, pid=question.pid, started=question.started)
        if self._has_ended(identity):
            self._send(peer, Ended(question.pid, question.started))

    def _send(self, peer: Peer, message: Message) -> bool:
        """Tell a process something, if it is the one that is up under its name."""
        return self.peers.current(peer.identity.name) is peer and self.channel.send(peer.identity.name, message)
