"""What a storage tier for cache pages implements: batches of pages by key, asynchronously.

A store is called from one thread, the cache's own I/O thread or the scheduler's, and never makes it wait: work is submitted,
and its end is polled. After `open` nothing raises; what goes wrong is said key by key in the completion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PageStore", "StoreContext", "StoreDone", "StoreUsage"]


@dataclass(frozen=True)
class StoreContext:
    """What a store is opened with.

    Attributes:
        page_bytes: size of every page, in bytes.
        namespace: of the keys: model revision, dtype, page size, layout and shard in one text. Pages of another namespace are
            never found, also in the same file or on the same server.
        timeout: seconds that opening, an orderly close and each submitted batch may take. A batch that is not over by then ends
            with an error as soon as nothing has its buffers in hand, and from then on nothing touches them.
        options: the store's own settings, such as a path or an address. A name that the store does not know is refused.
    """

    page_bytes: int
    namespace: str
    timeout: float = 30.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreDone:
    """The end of one submitted batch.

    Attributes:
        ticket: what the submission returned.
        ok: for each key: found (`submit_exists`), read whole and unharmed (`submit_get`), stored (`submit_put`), gone
            (`submit_remove`).
        error: the first thing that went wrong, in one sentence, or None. A page that is not there is not an error.
    """

    ticket: int
    ok: tuple[bool, ...]
    error: str | None = None


@dataclass(frozen=True)
class StoreUsage:
    """What a store holds: pages now, and pages it has room for (None: not known). Of all namespaces where they share room."""

    pages: int | None
    capacity: int | None


class PageStore(ABC):
    """A storage tier. Keys are byte strings of 1 to 64 bytes; a value is one page and never changes once stored under its key.

    Buffers are contiguous bytes of the caller's and must stay as they are until the batch has ended. A `submit_get` whose page is
    missing or damaged leaves its buffer undefined and says ``False``. `submit_exists` is a hint: a get after it may still say
    ``False``. A batch sees all that ended before it was submitted; batches that are out together run in any order.

    Nothing raises after `open`: a key or buffer that does not fit is ``False`` with an error, and a batch submitted after `close`
    ends at once, refused in the same way.

    Capabilities that a `PageStoreSpec` may declare:

    ``"durable"``
        a page whose put was acknowledged is found after this process has ended, also by ``kill -9``, and a store with the same
        options is opened again; never half of one.
    ``"shared"``
        several processes may have it open at a time and see each other's pages.
    ``"evicts"``
        when full, it makes room for new pages by forgetting those that were used least recently.
    """

    @abstractmethod
    def open(self, context: StoreContext) -> None:
        """Open or create the store, and recover what an earlier process left.

        Raises:
            CommplaneError: it cannot be used; the text says why and what to do.
        """

    @abstractmethod
    def submit_exists(self, keys: Sequence[bytes]) -> int:
        """Ask which keys are there: a ticket."""

    @abstractmethod
    def submit_get(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """Read pages into the caller's buffers of `page_bytes` each: a ticket."""

    @abstractmethod
    def submit_put(self, keys: Sequence[bytes], pages: Sequence[memoryview]) -> int:
        """Store pages from the caller's buffers: a ticket. A key that is there already counts as stored."""

    @abstractmethod
    def submit_remove(self, keys: Sequence[bytes]) -> int:
        """Forget keys: a ticket. A key that is not there counts as gone."""

    @abstractmethod
    def poll(self, timeout: float = 0.0) -> list[StoreDone]:
        """Ends of batches since the last call, each once; waits up to `timeout` seconds for the first. Also after `close`."""

    @abstractmethod
    def usage(self) -> StoreUsage:
        """What it holds, as far as known without waiting."""

    @abstractmethod
    def close(self) -> None:
        """End what was submitted, make it durable as far as the store promises, release everything. Idempotent."""
