"""The engine ``mooncake``: Mooncake's transfer engine over TCP or RDMA, peers found by address without a metadata server.

Its calls block until the bytes are written or it gives up, which for a stopped peer takes as long as Mooncake likes: the peer's
worker waits for that, the ticket does not. Over TCP a stopped peer also holds up the first transfer to any other (0.3.13), so
each peer gets a Mooncake of its own to write with; over RDMA, where memory is pinned for each, all share one. Mooncake forgets
nothing of a failed peer, but one that was started again has another port and so is another peer to it.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import msgspec

from commplane.api import TransferContext
from commplane.errors import CommplaneError, PeerError
from commplane_disagg.engines.base import PoolEngine, address_of, option
from commplane_disagg.engines.envelope import seal, unseal
from commplane_disagg.engines.pieces import Pieces
from commplane_disagg.engines.worker import PeerWorker, Piece, Stop

__all__ = ["Mooncake", "MooncakeMetadata", "load_mooncake"]

_VERSION = 1


class MooncakeMetadata(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What a peer has to know: Mooncake's name of the process, and where its pool lies."""

    session: str
    address: int
    nbytes: int


def load_mooncake() -> Any:
    """The module ``mooncake.engine``.

    Raises:
        CommplaneError: the package is absent or cannot be loaded.
    """
    # Each start prints a page, of which one line calls itself an error and is none.
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    os.environ.setdefault("GLOG_minloglevel", "2")
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise CommplaneError(
            "engine 'mooncake' wants the package mooncake: pip install 'commplane-disagg[mooncake]', or "
            "'commplane-disagg[mooncake-cpu]' "
            f"where there is no CUDA, and libibverbs and libnuma from the system ({error})"
        ) from error


class Mooncake(PoolEngine):
    """One end.

    Options: ``protocol``, ``tcp`` (default) or ``rdma``; ``devices``, names of the cards for ``rdma``, separated by commas.
    """

    name: ClassVar[str] = "mooncake"
    options = ("protocol", "devices")

    def __init__(self) -> None:
        super().__init__()
        self._native: Any = None
        self._session = ""
        self._is_shared = False
        self._start_native: Callable[[], Any] = lambda: None
        self._peers: dict[str, tuple[PeerWorker, MooncakeMetadata]] = {}

    def open(self, context: TransferContext) -> None:
        """Start Mooncake's server."""
        super().open(context)
        try:
            protocol = option(context, self.name, "protocol", "tcp")
            devices = option(context, self.name, "devices", "")
            self._is_shared = protocol != "tcp"
            self._start_native = lambda: self._new(protocol, devices)
            native = self._start_native()
        except CommplaneError:
            self._context = None
            raise
        self._native = native
        host = f"[{context.host}]" if ":" in context.host else context.host
        self._session = f"{host}:{native.get_rpc_port()}"

    def _new(self, protocol: str, devices: str) -> Any:
        native = load_mooncake().TransferEngine()
        if native.initialize(self.context.host, "P2PHANDSHAKE", protocol, devices) != 0:
            raise CommplaneError(
                f"engine 'mooncake' of {self.context.name!r} cannot start with protocol {protocol!r} at {self.context.host!r}; "
                f"its log says why"
            )
        return native

    def register(self, pool: memoryview) -> None:
        """With Mooncake."""
        super().register(pool)
        try:
            self._register_with(self._native)
        except CommplaneError:
            self._pool = None
            raise

    def _register_with(self, native: Any) -> None:
        if native.register_memory(address_of(self.pool), self.pool.nbytes) != 0:
            raise CommplaneError(
                f"engine 'mooncake' of {self.context.name!r} cannot register {self.pool.nbytes} bytes; its log says why"
            )

    def metadata(self) -> bytes:
        """The session's name, and where the pool lies."""
        return seal(self.name, _VERSION, MooncakeMetadata(self._session, address_of(self.pool), self.pool.nbytes))

    def connect(self, peer: str, metadata: bytes) -> None:
        """Ask the peer for its memory."""
        _ = self.pool
        found = unseal(self.name, _VERSION, MooncakeMetadata, metadata, peer)
        if peer in self._peers:
            worker, known = self._peers[peer]
            if known == found and worker.why_lost is None:
                return
            self.disconnect(peer)
        self._ask(peer, found)
        native = self._native
        if not self._is_shared:
            native = self._start_native()
            self._register_with(native)

        def move(pieces: Sequence[Piece], _: Callable[[], bool]) -> None:
            here = address_of(self.pool)
            code = native.batch_transfer_sync_write(
                found.session,
                [here + start for start, _, _ in pieces],
                [found.address + to for _, to, _ in pieces],
                [nbytes for _, _, nbytes in pieces],
            )
            if code < 0:
                raise Stop(f"peer {peer!r} is lost: Mooncake says {code}")

        self._peers[peer] = (PeerWorker(peer, move, self._ends, self.context.timeout), found)

    def _ask(self, peer: str, found: MooncakeMetadata) -> None:
        """Mooncake's own probe, which blocks: in a thread, which is left to itself if the peer is stopped."""
        answer: list[int] = []
        native = self._native
        thread = threading.Thread(
            target=lambda: answer.append(native.send_probe(found.session)), name=f"commplane-mooncake {peer}", daemon=True
        )
        thread.start()
        thread.join(self.context.timeout)
        if not answer:
            raise PeerError(f"peer {peer!r} at {found.session} did not answer within {self.context.timeout:g} s: is it stopped?")
        if answer[0] != 0:
            raise PeerError(f"peer {peer!r} at {found.session} is not there: Mooncake says {answer[0]}; is it running?")

    def _remote_pool(self, peer: str) -> int:
        worker, found = self._peers.get(peer, (None, None))
        if worker is None or found is None:
            raise CommplaneError(f"peer {peer!r} is not connected to {self.context.name!r}: call connect first")
        if worker.why_lost is not None:
            raise CommplaneError(f"{worker.why_lost}; connect to it again")
        return found.nbytes

    def _start(self, peer: str, ticket: int, pieces: Pieces) -> None:
        self._peers[peer][0].start(ticket, pieces)

    def cancel(self, ticket: int) -> None:
        """Between two batches."""
        peer = self._ends.peer_of(ticket)
        if peer is not None and peer in self._peers:
            self._peers[peer][0].cancel(ticket)

    def disconnect(self, peer: str) -> None:
        """Of this end's writing; what the peer writes here, only the peer can end."""
        if peer in self._peers:
            worker, _ = self._peers.pop(peer)
            worker.lose(f"peer {peer!r} was disconnected")
            worker.join(self.context.timeout)

    def close(self) -> None:
        """Mooncake's threads end with its last call."""
        if self._context is None:
            return
        for peer in list(self._peers):
            self.disconnect(peer)
        if self._pool is not None:
            self._native.unregister_memory(address_of(self.pool))
        self._native = self._pool = self._context = None
