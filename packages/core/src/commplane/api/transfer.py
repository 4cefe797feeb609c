"""What a KV transfer engine implements: bytes from a pool of this process into a pool of another one.

An engine moves bytes and nothing else. Which pages belong to which request, who acknowledges what and when a page may be used
again is said over a channel of the caller's own. All methods are local; none blocks longer than it says.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Moved", "TransferContext", "TransferEngine"]


@dataclass(frozen=True)
class TransferContext:
    """What an engine is opened with.

    Attributes:
        name: of this end, unique among all ends that may meet, such as ``"prefill-3/tp0"``.
        host: address of this machine that peers reach.
        timeout: seconds that one wait of the engine's own may take: a connect, an orderly close, a transfer without progress.
        options: the engine's own settings.
    """

    name: str
    host: str = "127.0.0.1"
    timeout: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Moved:
    """The end of one transfer.

    Attributes:
        ticket: what `TransferEngine.submit` returned.
        error: None if every byte is in the peer's pool and visible to the peer; else why not, in one sentence.
    """

    ticket: int
    error: str | None = None


class TransferEngine(ABC):
    """One end of transfers. Not thread-safe: one thread calls it.

    A transfer of which the peer has not acknowledged anything for the context's timeout ends with an error, so every ticket ends.

    Capabilities that a `TransferSpec` may declare:

    ``"network"``
        reaches peers on other hosts.
    ``"quiet"``
        once `poll` has given a ticket's end, or `disconnect` has returned at the writing end, no byte of it can land any more,
        whatever state the peer is in. Of a writer whose process has ended nothing can land either.
    ``"fenced"``
        once `disconnect` has returned at the end whose pool was written, no byte of that peer's can land in it any more, whether
        the peer is alive, stopped or dead and whether this end had connected to it or not; until one of the two connects again.

    Without either the caller quarantines the pages of a transfer that failed.

    ``"device"``
        takes memory of a device, as a tensor.
    """

    @abstractmethod
    def open(self, context: TransferContext) -> None:
        """Take what is needed to serve peers.

        Raises:
            CommplaneError: it cannot work here; the text says why and what to do.
        """

    def allocate(self, nbytes: int) -> memoryview:
        """Zeroed, page-aligned memory that this engine moves best. It lives until `close`."""
        return memoryview(mmap.mmap(-1, nbytes))

    @abstractmethod
    def register(self, pool: memoryview) -> None:
        """Name the memory that `submit` reads and that peers write into, once, before `metadata`.

        Args:
            pool: writable and contiguous, from `allocate` or the caller's own; outlives the engine.
        """

    @abstractmethod
    def metadata(self) -> bytes:
        """What a peer needs in order to `connect`; opaque, at most 64 KiB."""

    @abstractmethod
    def connect(self, peer: str, metadata: bytes) -> None:
        """Make `peer`'s pool writable from here. Again, with new metadata, after `disconnect` or a restart of the peer.

        Raises:
            PeerError: the peer does not answer within the context's timeout.
            CommplaneError: the metadata is of another engine, or the peer's memory cannot be reached from here.
        """

    @abstractmethod
    def submit(self, peer: str, local: Sequence[int], remote: Sequence[int], nbytes: int | Sequence[int]) -> int:
        """Start to write pieces of the local pool into the peer's: a ticket for `poll`. Returns at once.

        Args:
            peer: a connected one.
            local: offset of each piece in this pool, in bytes.
            remote: offset of each piece in the peer's pool, in bytes.
            nbytes: size of each piece, or one size for all.

        Raises:
            CommplaneError: the peer is not connected, or a piece lies outside of a pool; nothing was started.
        """

    @abstractmethod
    def poll(self, timeout: float = 0.0) -> list[Moved]:
        """Ends of transfers since the last call; waits up to `timeout` seconds for the first. A lost peer raises nothing."""

    @abstractmethod
    def cancel(self, ticket: int) -> None:
        """Give up on a transfer: it ends through `poll`, as moved or with an error. What was written stays written."""

    @abstractmethod
    def disconnect(self, peer: str) -> None:
        """Forget `peer`: its open transfers end through `poll` with an error. Idempotent.

        `peer` is the name of the context of the other end, which need not have been connected to from here.
        """

    @abstractmethod
    def close(self) -> None:
        """Disconnect everybody and release what `open` took. Idempotent."""
