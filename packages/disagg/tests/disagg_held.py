"""An engine inside one process whose transfers end when the test says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from commplane.api.transfer import Moved, TransferContext, TransferEngine
from commplane.errors import CommplaneError


class HeldEngine(TransferEngine):
    """Nothing moves before `let_go` or `fail`. After `cancel` and `disconnect` a quiet one moves nothing more."""

    everybody: ClassVar[dict[bytes, HeldEngine]] = {}

    def __init__(self, *, quiet: bool = True) -> None:
        self.quiet = quiet
        self.peers: dict[str, HeldEngine] = {}
        self.held: dict[int, tuple[HeldEngine, list[tuple[int, int, int]], str]] = {}
        self.ended: list[Moved] = []
        self.calls: list[str] = []
        self.tickets = 0

    def open(self, context: TransferContext) -> None:
        self.key = f"{context.name} {id(self)}".encode()
        self.everybody[self.key] = self

    def register(self, pool: memoryview) -> None:
        self.pool = pool

    def metadata(self) -> bytes:
        return self.key

    def connect(self, peer: str, metadata: bytes) -> None:
        self.calls.append(f"connect {peer}")
        self.peers[peer] = self.everybody[metadata]

    def submit(self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int]) -> int:
        if peer not in self.peers:
            raise CommplaneError(f"{peer} is not connected")
        sizes = [nbytes] * len(local) if isinstance(nbytes, int) else nbytes
        self.tickets += 1
        self.held[self.tickets] = self.peers[peer], list(zip(local, remote, sizes, strict=True)), peer
        return self.tickets

    def let_go(self) -> None:
        """Everything that was submitted arrives."""
        for ticket in list(self.held):
            there, pieces, _ = self.held.pop(ticket)
            for here, where, size in pieces:
                there.pool[where : where + size] = self.pool[here : here + size]
            self.ended.append(Moved(ticket))

    def fail(self, why: str) -> None:
        """Everything that was submitted ends badly, with half of it written."""
        for ticket in list(self.held):
            there, pieces, _ = self.held.pop(ticket)
            for here, where, size in pieces[: len(pieces) // 2]:
                there.pool[where : where + size] = self.pool[here : here + size]
            self.ended.append(Moved(ticket, why))

    def poll(self, timeout: float = 0.0) -> list[Moved]:
        ended, self.ended = self.ended, []
        return ended

    def cancel(self, ticket: int) -> None:
        self.calls.append("cancel")
        if self.held.pop(ticket, None) is not None:
            self.ended.append(Moved(ticket, "cancelled"))

    def disconnect(self, peer: str) -> None:
        self.calls.append(f"disconnect {peer}")
        self.peers.pop(peer, None)
        for ticket in [t for t, (_, _, name) in self.held.items() if name == peer]:
            self.cancel(ticket)

    def close(self) -> None:
        self.everybody.pop(self.key, None)
        self.held.clear()
