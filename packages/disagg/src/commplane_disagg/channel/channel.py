"""All connections of one end: it listens, dials, beats, notices silence and connects again. One thread drives it by `poll`."""

from __future__ import annotations

import errno
import random
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from commplane.errors import ConfigError
from commplane_disagg.channel import messages as m
from commplane_disagg.channel.link import Link, Stage
from commplane_disagg.channel.process import identity
from commplane_disagg.resolve import resolve

__all__ = ["Channel", "Down", "Event", "Said", "Up", "bind"]


_ACCEPTS = 128
"""Connections that one `poll` takes at most."""

_RESOLVE_S = 1.0
"""What a name server may take of a step; an address costs nothing, and who registers may well do so with one."""

_UNUSABLE = (OSError, ValueError, OverflowError)
"""What an address raises that is none: ValueError for a name that cannot be encoded, as UnicodeError or for a null in it."""


@dataclass(frozen=True)
class Up:
    """A peer is there, for the first time or again."""

    peer: m.Identity
    card: bytes


@dataclass(frozen=True)
class Down:
    """The connection to a peer broke. That says nothing about its process, unless its last word was that it has `ended`."""

    peer: m.Identity
    why: str
    ended: bool = False


@dataclass(frozen=True)
class Said:
    """A message of a peer that is up."""

    peer: m.Identity
    message: m.Message


Event = Up | Down | Said


@dataclass
class _Target:
    """A peer that this end dials until it is told not to."""

    host: str
    port: int
    again: float = 0.0
    tries: int = 0
    link: Link | None = None
    why: str = "not tried yet"


def bind(host: str, port: int = 0) -> socket.socket:
    """A listening socket on a port that is held from here on; 0 takes a free one.

    Raises:
        ConfigError: the address cannot be bound.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, proto)
    except _UNUSABLE as error:
        raise ConfigError(f"channel: {host} cannot be used as an address: {error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(512)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"channel: {host} port {port} cannot be bound: {error}; choose another one, or 0 for a free one"
        ) from error
    return sock


class Channel:
    """Messages between this end and its peers, in order while a connection lasts; one that breaks loses what was not read.

    Args:
        name: of this end.
        instance: of this process; None: a new random one.
        token: shared with all peers; None switches authentication off.
        listener: a bound, listening socket, which the channel then owns; None for an end that only dials.
        card: given to each peer before it is up.
        beat: seconds after which a quiet end says that it is there.
        silence: seconds without a byte after which a connection is given up. An end that is not polled for so long is lost to its
            peers.
        handshake: seconds that connecting may take, and the introduction again.
        strangers: accepted connections that may be in their introduction at a time; an old one has to go for a new one.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        *,
        instance: str | None = None,
        token: bytes | None,
        listener: socket.socket | None = None,
        card: bytes = b"",
        beat: float = 1.0,
        silence: float = 15.0,
        handshake: float = 5.0,
        strangers: int = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = identity(name, instance)
        self.card = card
        self.refused: list[str] = []
        self._token, self._beat, self._silence, self._handshake = token, beat, silence, handshake
        self._strangers, self._clock = strangers, clock
        self._selector = selectors.DefaultSelector()
        self._links: set[Link] = set()
        self._up: dict[str, Link] = {}
        self._targets: dict[str, _Target] = {}
        self._listener = listener
        self._closed = False
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, None)

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port that are listened on."""
        return self._listener.getsockname()[:2] if self._listener is not None else None

    def is_up(self, name: str) -> bool:
        """Whether messages to this peer leave now."""
        return name in self._up

    def trouble(self, name: str) -> str:
        """Why a dialled peer is not up, as far as known."""
        target = self._targets.get(name)
        return target.why if target is not None else "it has not connected"

    def dial(self, name: str, host: str, port: int) -> None:
        """Be connected to this peer from now on, whatever happens to the connection. A new address takes the old one's place."""
        target = self._targets.get(name)
        if target is None or (target.host, target.port) != (host, port):
            if target is not None and target.link is not None:
                target.link.close("the peer has a new address")
            self._targets[name] = _Target(host, port)

    def forget(self, name: str) -> None:
        """Dial this peer no more, and close what there is to it."""
        self._targets.pop(name, None)
        self.cut(name, "")

    def cut(self, name: str, why: str) -> None:
        """Close the connection to a peer that broke the rules, and tell it why. Who dialled may dial again."""
        link = self._up.get(name)
        if link is not None:
            link.refuse(why, self._clock())

    def send(self, name: str, message: m.Message) -> bool:
        """Queue a message for a peer; False if it is not up, then nothing was queued. Leaves in this or the next `poll`."""
        link = self._up.get(name)
        if link is None or link.stage is not Stage.UP:
            return False
        link.send(message, self._clock())
        link.write()
        return link.stage is Stage.UP

    def poll(self, timeout: float = 0.0) -> list[Event]:
        """Read, write, beat and dial; what happened since the last call. Waits up to `timeout` seconds for the first byte."""
        events: list[Event] = []
        now = self._clock()
        self._dial(now)
        self._reap(events)
        for link in self._links:
            flags = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.wants_to_write else 0)
            if link.watched != flags:
                self._selector.modify(link.sock, flags, link)
                link.watched = flags
        for key, flags in self._selector.select(timeout):
            now = self._clock()
            if key.data is None:
                for _ in range(_ACCEPTS):
                    if not self._accept(now):
                        break
                continue
            link = key.data
            if flags & selectors.EVENT_WRITE and link.stage is not Stage.CLOSED:
                link.write()
            if flags & selectors.EVENT_READ and link.stage is not Stage.CLOSED:
                was_up = link.stage is Stage.UP
                said = link.read(now)
                if not was_up and (link.stage is Stage.UP or said):
                    self._arrived(link, events)
                events += [Said(link.peer, message) for message in said if link.peer is not None]
        self._keep_alive(self._clock())
        self._reap(events)
        return events

    def close(self) -> None:
        """Take leave of everybody for good, as far as that does not wait, and release all sockets. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for link in self._links:
            link.refuse("", self._clock(), ended=True)
            link.sock.close()
        self._links.clear()
        self._up.clear()
        self._targets.clear()
        self._selector.close()
        if self._listener is not None:
            self._listener.close()

    def _dial(self, now: float) -> None:
        for name, target in self._targets.items():
            if target.link is not None or name in self._up or now < target.again:
                continue
            target.tries += 1
            target.again = now + min(2.0, 0.05 * 2 ** min(target.tries, 8)) * random.uniform(0.75, 1.25)
            try:
                family, kind, proto, _, address = resolve(target.host, target.port, time.monotonic() + _RESOLVE_S)[0]
                sock = socket.socket(family, kind, proto)
            except _UNUSABLE as error:
                target.why = f"{target.host} port {target.port}: {error}"
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            failed = sock.connect_ex(address)
            link = Link(sock, mine=self.identity, card=self.card, token=self._token, now=now, wanted=name)
            target.link = link
            self._links.add(link)
            self._selector.register(sock, link.watched, link)
            if failed not in (0, errno.EAGAIN, errno.EINPROGRESS):
                link.close(f"connect failed with error {failed}")

    def _accept(self, now: float) -> bool:
        """Take one connection that waits; False if there is none."""
        assert self._listener is not None
        pending = [x for x in self._links if x.wanted is None and x.peer is None and x.stage is not Stage.CLOSED]
        oldest = min(pending, key=lambda x: x.born) if len(pending) >= self._strangers else None
        if oldest is not None and now - oldest.born < self._handshake / 5:
            return False  # it may be about to speak: who comes now waits in the backlog
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            self.refused.append(f"accept: {error}")
            return False
        if oldest is not None:
            oldest.close("too many connections have not introduced themselves")
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(sock, mine=self.identity, card=self.card, token=self._token, now=now)
        self._links.add(link)
        self._selector.register(sock, link.watched, link)
        return True

    def _arrived(self, link: Link, events: list[Event]) -> None:
        """A link came up: it takes the place of an older one of the same name."""
        assert link.peer is not None
        name = link.peer.name
        old = self._up.get(name)
        if old is not None and old is not link:
            old.close("the peer connected again")
            self._drop(old, events)
        self._up[name] = link
        if name in self._targets:
            self._targets[name].tries = 0
        events.append(Up(link.peer, link.card))

    def _keep_alive(self, now: float) -> None:
        for link in self._links:
            if link.stage is Stage.UP:
                if now - link.heard > self._silence:
                    link.close(f"nothing was heard for {now - link.heard:.1f} s")
                elif now - link.said > self._beat:
                    link.send(m.Beat(), now)
                    link.write()
            elif link.stage is not Stage.CLOSED and now - link.born > self._handshake:
                link.close(f"the introduction was not over after {self._handshake:g} s")

    def _reap(self, events: list[Event]) -> None:
        for link in [x for x in self._links if x.stage is Stage.CLOSED]:
            self._drop(link, events)

    def _drop(self, link: Link, events: list[Event]) -> None:
        if link not in self._links:
            return
        self._links.discard(link)
        self._selector.unregister(link.sock)
        link.sock.close()
        for target in self._targets.values():
            if target.link is link:
                target.link, target.why = None, link.why
        if link.peer is not None and self._up.get(link.peer.name) is link:
            del self._up[link.peer.name]
            events.append(Down(link.peer, link.why, link.ended))
        elif link.wanted is None:
            self.refused.append(link.why)
            del self.refused[:-100]
