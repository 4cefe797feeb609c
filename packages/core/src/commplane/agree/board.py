"""A place on the store where ranks leave lines in any order, and one decision."""

from __future__ import annotations

from commplane.agree.store import BoundedStore

__all__ = ["Board"]


class Board:
    """Lines of all ranks under one key, and the first decision. Nobody is waited for; calls end as `BoundedStore`'s do.

    Args:
        store: shared by all ranks.
        prefix: of its keys; equal on all ranks, used by nothing else.
    """

    def __init__(self, store: BoundedStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def add(self, line: str) -> None:
        """Leave a line, which has no line break in it. If that fails, the next call raises."""
        self._store.append(f"{self._prefix}/lines", f"{line}\n")

    def lines(self) -> list[str]:
        """Of all ranks, in the order in which they came."""
        return self._store.peek(f"{self._prefix}/lines").decode().splitlines()

    def decide(self, value: str) -> str:
        """Decide, unless somebody was first: what is decided."""
        return self._store.decide(f"{self._prefix}/decision", value).decode()

    def decision(self) -> str:
        """What is decided, or an empty text."""
        return self._store.peek(f"{self._prefix}/decision").decode()
