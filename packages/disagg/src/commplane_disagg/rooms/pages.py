"""Which room has which page of the pool. The one place that says that a page may be used again."""

from __future__ import annotations

from collections.abc import Sequence

from commplane.errors import CommplaneError
from commplane_disagg.rooms.state import Key

__all__ = ["PageLedger"]


class PageLedger:
    """Pages and the rooms they are lent to.

    Args:
        pages: number of pages in the pool.
        shared: a page may be in several rooms at once: those of prefill are only read, and a prefix belongs to many requests.
    """

    def __init__(self, pages: int, *, shared: bool) -> None:
        self.pages, self.shared = pages, shared
        self._holders: dict[int, dict[Key, None]] = {}
        self._lent: dict[Key, list[int]] = {}

    def lend(self, key: Key, pages: Sequence[int]) -> None:
        """From now on these pages are the room's, beside those it has.

        Raises:
            CommplaneError: a page is outside of the pool, named twice, or another room's; nothing was lent.
        """
        fresh: set[int] = set()
        for page in pages:
            if not 0 <= page < self.pages:
                raise CommplaneError(f"{key}: page {page} is outside of the pool of {self.pages} pages")
            holders = self._holders.get(page, {})
            if page in fresh or key in holders:
                raise CommplaneError(f"{key}: page {page} is named twice")
            if holders and not self.shared:
                raise CommplaneError(f"{key}: page {page} still belongs to {next(iter(holders))}; wait until that is released")
            fresh.add(page)
        for page in pages:
            self._holders.setdefault(page, {})[key] = None
        self._lent.setdefault(key, []).extend(pages)

    def give_back(self, key: Key) -> tuple[int, ...]:
        """The room's pages, which are nobody's now, or with `shared` another room's still."""
        pages = self._lent.pop(key, [])
        for page in pages:
            holders = self._holders[page]
            del holders[key]
            if not holders:
                del self._holders[page]
        return tuple(pages)

    def holders(self, page: int) -> tuple[Key, ...]:
        """The rooms that have a page."""
        return tuple(self._holders.get(page, ()))

    def lent(self, key: Key) -> tuple[int, ...]:
        """The room's pages, in the order in which they were lent."""
        return tuple(self._lent.get(key, ()))

    def held(self, key: Key) -> int:
        """Number of pages of a room."""
        return len(self._lent.get(key, ()))

    def __len__(self) -> int:
        return len(self._holders)
