"""Pools of pages: who owns each page, and how many may be given away without the ranks disagreeing.

A page has one owner at any time. Every change of hands names the old owner, and is refused where another one is found: a page
that is freed twice, or is in the tree and on its way at once, is an error where it happens, not wrong tokens later.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from commplane.errors import CommplaneError, ConfigError

__all__ = ["FREE", "HELD", "MOVING", "OWNERS", "TREE", "CopyEvent", "Copier", "FlatCopier", "HostTier", "Pool"]

FREE, HELD, MOVING, TREE = range(4)
OWNERS = ("free", "held", "moving", "tree")
"""Nobody; a request of the engine; a copy or an I/O that has not been agreed to have ended; the tree."""


class Pool:
    """Pages ``0`` to ``capacity - 1`` of one tier. Local.

    Attributes:
        name: of the tier, for messages.
        capacity: pages of this rank.
        surplus: pages that this rank has free beyond the rank with the fewest, as of the last agreed round: never used, so
            that all ranks find room, or none. Before the first round all of them.
        owned: pages by owner, in the order of `OWNERS`.
    """

    def __init__(self, name: str, capacity: int) -> None:
        if capacity < 1:
            raise ConfigError(f"cache {name}: wanted at least one page, found {capacity}")
        self.name, self.capacity, self.surplus = name, capacity, capacity
        self.owned = [capacity, 0, 0, 0]
        self._stack = np.arange(capacity - 1, -1, -1, dtype=np.int64)
        self._owner = np.zeros(capacity, dtype=np.uint8)

    @property
    def free(self) -> int:
        """Free pages of this rank."""
        return self.owned[FREE]

    @property
    def available(self) -> int:
        """Pages that may be taken: equal on all ranks."""
        return self.owned[FREE] - self.surplus

    def take(self, count: int, owner: int) -> np.ndarray:
        """`count` free pages for `owner`; the caller has looked at `available`."""
        free = self.owned[FREE]
        if count > free:
            raise CommplaneError(f"cache {self.name}: {count} pages were to be taken and {free} are free")
        pages: np.ndarray = self._stack[free - count : free].copy()
        self._check(pages, FREE, owner)
        self._owner[pages] = owner
        self.owned[FREE] -= count
        self.owned[owner] += count
        return pages

    def hand_over(self, pages: np.ndarray, old: int, new: int) -> None:
        """`pages` go from one owner to another, neither of them nobody."""
        self._check(pages, old, new)
        self._owner[pages] = new
        self.owned[old] -= len(pages)
        self.owned[new] += len(pages)

    def give_back(self, pages: np.ndarray, old: int) -> None:
        """`pages` are free again."""
        count, free = len(pages), self.owned[FREE]
        self._check(pages, old, FREE)
        self._owner[pages] = FREE
        self._stack[free : free + count] = pages
        self.owned[old] -= count
        self.owned[FREE] = free + count

    def _check(self, pages: np.ndarray, old: int, new: int) -> None:
        if self._owner[pages].tobytes() != _BYTE[old] * len(pages):
            wrong = [f"{p} of {OWNERS[self._owner[p]]}" for p in pages.tolist() if self._owner[p] != old][:8]
            raise CommplaneError(
                f"cache {self.name}: pages were to go from {OWNERS[old]} to {OWNERS[new]}, and these have another owner: "
                f"{', '.join(wrong)}"
            )

    def audit(self, tree: list[np.ndarray], moving: list[np.ndarray]) -> None:
        """Compare with what the tree and the work on its way say that they own.

        Raises:
            CommplaneError: a page is lost, owned twice, or counted wrong.
        """
        counts = np.bincount(self._owner, minlength=4).tolist()
        if counts != self.owned:
            raise CommplaneError(f"cache {self.name}: pages by owner are {counts}, counted were {self.owned}")
        free = self._stack[: self.owned[FREE]]
        for owner, claims in ((TREE, tree), (MOVING, moving), (FREE, [free])):
            pages = np.concatenate(claims) if claims else np.empty(0, np.int64)
            if len(np.unique(pages)) != len(pages):
                twice = sorted({p for p in pages.tolist() if (pages == p).sum() > 1})[:8]
                raise CommplaneError(f"cache {self.name}: pages are owned twice by {OWNERS[owner]}: {twice}")
            if len(pages) != self.owned[owner] or (self._owner[pages] != owner).any():
                raise CommplaneError(
                    f"cache {self.name}: {OWNERS[owner]} claims {len(pages)} pages and is written down with {self.owned[owner]}"
                )


_BYTE = [bytes([owner]) for owner in range(4)]


class CopyEvent(Protocol):
    """The end of a copy; ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether the copy has ended. Never waits; raises where it failed."""


class Copier(Protocol):
    """Copies pages between the tiers of this rank; the engine's, which knows how its KV cache lies.

    Either method may return before the bytes have moved, with an event. Whatever the engine does with the device pages after
    the call must come after the copy, as it does on one stream. A copy that fails raises; the cache then tells the other ranks.
    """

    def to_host(self, device: np.ndarray, host: np.ndarray) -> CopyEvent | None:
        """Copy device pages to host pages, as many: None where that is done."""

    def to_device(self, host: np.ndarray, device: np.ndarray) -> CopyEvent | None:
        """Copy host pages to device pages, as many: None where that is done."""


class HostTier:
    """Host pages in the caller's memory: a CPU tensor, an array or a memoryview of ``pages x page_bytes`` bytes.

    The memory outlives the cache; pinned memory makes copies to a GPU faster, and is the caller's business.

    Attributes:
        page_bytes: size of a page.
        pages: how many there are.
    """

    def __init__(self, memory: Any, page_bytes: int) -> None:
        flat = bytes_of(memory)
        if page_bytes < 1 or len(flat) % page_bytes or not len(flat):
            raise ConfigError(f"cache host: wanted whole pages of {page_bytes} bytes, found {len(flat)} bytes")
        self.page_bytes, self.pages = page_bytes, len(flat) // page_bytes
        self._flat = flat

    def views(self, pages: np.ndarray) -> list[memoryview]:
        """The memory of some pages, for a store."""
        size, flat = self.page_bytes, self._flat
        return [flat[p * size : (p + 1) * size] for p in pages.tolist()]


def bytes_of(memory: Any) -> memoryview:
    """The bytes of a contiguous CPU tensor, array or buffer, writable and without a copy."""
    if hasattr(memory, "data_ptr"):  # a torch tensor, of any dtype: numpy knows fewer
        import torch

        memory = memory.detach().reshape(-1).view(torch.uint8).numpy()
    view = memoryview(memory)
    if view.readonly or not view.c_contiguous:
        raise ConfigError("cache: wanted memory that is writable and contiguous")
    return view.cast("B")


class FlatCopier:
    """Copies between two memories in which a page is one piece; on CPU, at once.

    Args:
        device: what the engine computes with: tensor, array or memoryview of ``pages x page_bytes`` bytes.
        host: the memory of the `HostTier`.
        page_bytes: size of a page.
    """

    def __init__(self, device: Any, host: Any, page_bytes: int) -> None:
        self._device = np.frombuffer(bytes_of(device), np.uint8).reshape(-1, page_bytes)
        self._host = np.frombuffer(bytes_of(host), np.uint8).reshape(-1, page_bytes)

    def to_host(self, device: np.ndarray, host: np.ndarray) -> None:
        """Done when it returns."""
        self._host[host] = self._device[device]

    def to_device(self, host: np.ndarray, device: np.ndarray) -> None:
        """Done when it returns."""
        self._device[device] = self._host[host]
