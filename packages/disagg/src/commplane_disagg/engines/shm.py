"""The engine ``shm``: both ends are processes of one host, the writer maps the reader's pool, and one memcpy moves a page.

The pool that is written has to come from `allocate`: an anonymous file, handed over through a socket (`engines.handover`). One
thread copies, without Python's lock. A ticket ends after its last byte was copied, so nothing of it can land later; but a writer
that is stopped inside of a copy goes on when it is continued, which its peer cannot prevent.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import msgspec

from commplane.api import TransferContext
from commplane.errors import CommplaneError
from commplane_disagg.engines.base import PoolEngine, address_of
from commplane_disagg.engines.envelope import seal, unseal
from commplane_disagg.engines.handover import Door, is_gone, knock
from commplane_disagg.engines.memory import Mapping, SharedPool, host_identity, map_peer
from commplane_disagg.engines.pieces import Pieces

__all__ = ["SharedMemory", "ShmMetadata"]

_VERSION = 1
_CHUNK = 8 << 20
"""Bytes that are copied at once: as long as a cancelled transfer, or `close`, may go on."""


class ShmMetadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a peer has to know.

    Attributes:
        host: of `engines.memory.host_identity`.
        address: of the door.
        token: for it.
        offset: of the pool in its file.
        nbytes: of the pool; 0 if it cannot be mapped.
        pid: for the texts of errors.
    """

    host: str
    address: str
    token: bytes
    offset: int
    nbytes: int
    pid: int


@dataclass
class _Peer:
    connection: socket.socket
    mapping: Mapping
    metadata: bytes


class SharedMemory(PoolEngine):
    """One end."""

    name: ClassVar[str] = "shm"

    def __init__(self) -> None:
        super().__init__()
        self._pools: list[SharedPool] = []
        self._door: Door | None = None
        self._offset: int | None = None
        self._peers: dict[str, _Peer] = {}
        self._jobs: deque[tuple[str, int, Pieces, _Peer]] = deque()
        self._changed = threading.Condition()
        self._cancelled: set[int] = set()
        self._copying: str | None = None
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def open(self, context: TransferContext) -> None:
        """Start the thread that copies."""
        super().open(context)
        self._thread = threading.Thread(target=self._copy_all, name=f"commplane-shm {context.name}", daemon=True)
        self._thread.start()

    def allocate(self, nbytes: int) -> memoryview:
        """Memory that peers can map."""
        _ = self.context
        self._pools.append(SharedPool.create(nbytes))
        return self._pools[-1].view

    def register(self, pool: memoryview) -> None:
        """Any memory can be read from; peers can write only into what `allocate` gave."""
        super().register(pool)
        for shared in self._pools:
            self._offset = shared.offset_of(self.pool)
            if self._offset is not None:
                self._door = Door(shared.fd)
                return

    def metadata(self) -> bytes:
        """Of the pool's file, and of who hands it over."""
        nbytes, host = self.pool.nbytes, host_identity()
        if self._door is None or self._offset is None:
            return seal(self.name, _VERSION, ShmMetadata(host, "", b"", 0, 0, os.getpid()))
        body = ShmMetadata(host, self._door.address, self._door.token, self._offset, nbytes, os.getpid())
        return seal(self.name, _VERSION, body)

    def connect(self, peer: str, metadata: bytes) -> None:
        """Map the peer's pool."""
        _ = self.pool
        found = unseal(self.name, _VERSION, ShmMetadata, metadata, peer)
        here = host_identity()
        if found.host != here:
            raise CommplaneError(
                f"peer {peer!r} shares no memory with this process: wanted one host and network namespace ({here}), found "
                f"{found.host}; use an engine with the capability network"
            )
        if not found.nbytes:
            raise CommplaneError(f"the pool of peer {peer!r} cannot be mapped: wanted memory from its engine's allocate")
        old = self._peers.get(peer)
        if old is not None and old.metadata == metadata and not is_gone(old.connection):
            return
        self.disconnect(peer)
        connection, fd = knock(found.address, found.token, peer, self._until())
        try:
            mapping = map_peer(fd, found.offset, found.nbytes, peer)
        except CommplaneError:
            connection.close()
            raise
        finally:
            os.close(fd)
        self._peers[peer] = _Peer(connection, mapping, bytes(metadata))

    def _remote_pool(self, peer: str) -> int:
        if peer not in self._peers:
            raise CommplaneError(f"peer {peer!r} is not connected to {self.context.name!r}: call connect first")
        return self._peers[peer].mapping.nbytes

    def _start(self, peer: str, ticket: int, pieces: Pieces) -> None:
        with self._changed:
            self._jobs.append((peer, ticket, pieces, self._peers[peer]))
            self._changed.notify_all()

    def _copy_all(self) -> None:
        while True:
            with self._changed:
                self._copying = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._is_closing)
                if self._is_closing:
                    return
                peer, ticket, pieces, target = self._jobs.popleft()
                self._copying = peer
            self._ends.end(ticket, self._copy(peer, ticket, pieces, target))
            self._cancelled.discard(ticket)
            del pieces, target  # a peer's mapping goes when it is forgotten, not with the next job

    def _copy(self, peer: str, ticket: int, pieces: Pieces, target: _Peer) -> str | None:
        local, remote = address_of(self.pool), target.mapping.address
        for start, to, nbytes in pieces.joined(_CHUNK):
            if ticket in self._cancelled:
                return "cancelled: what was written stays written"
            ctypes.memmove(remote + to, local + start, nbytes)
        if is_gone(target.connection):
            return f"peer {peer!r} is gone: its process ended or closed its engine"
        return None

    def cancel(self, ticket: int) -> None:
        """At once if it waits; else between two chunks."""
        with self._changed:
            waits = any(job[1] == ticket for job in self._jobs)
            if waits:
                self._jobs = deque(job for job in self._jobs if job[1] != ticket)
            elif self._ends.is_open(ticket):
                self._cancelled.add(ticket)
        if waits:
            self._ends.end(ticket, "cancelled: nothing was written")

    def disconnect(self, peer: str) -> None:
        """Waits for the chunk that is being copied, so that nothing lands afterwards."""
        with self._changed:
            mine = [job[1] for job in self._jobs if job[0] == peer]
            self._jobs = deque(job for job in self._jobs if job[0] != peer)
            self._cancelled.update(t for t in self._ends.open_of(peer) if t not in mine)
            self._changed.wait_for(lambda: self._copying != peer)
        for ticket in mine:
            self._ends.end(ticket, f"peer {peer!r} was disconnected before anything was written")
        gone = self._peers.pop(peer, None)
        if gone is not None:
            gone.connection.close()

    def close(self) -> None:
        """Peers that write here learn of it."""
        if self._context is None:
            return
        for peer in list(self._peers):
            self.disconnect(peer)
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._door is not None:
            self._door.close()
        for pool in self._pools:
            pool.close()
        self._pools, self._door, self._pool, self._context = [], None, None, None
