"""A client of a c10d store that counts what goes through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Calls", "CountedStore", "merge"]


@dataclass
class Calls:
    """Calls of one kind. `sent` and `received` are bytes of keys and values, without what the protocol adds."""

    calls: int = 0
    keys: int = 0
    sent: int = 0
    received: int = 0


def merge(into: dict[str, Calls], other: dict[str, Calls]) -> None:
    """Add the calls of another client."""
    for kind, more in other.items():
        mine = into.setdefault(kind, Calls())
        mine.calls += more.calls
        mine.keys += more.keys
        mine.sent += more.sent
        mine.received += more.received


class CountedStore:
    """The methods that the control plane calls, each handed on and counted. For one thread at a time.

    Attributes:
        calls: by the name of the method.
        decided: rounds that this rank published as the first.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls: dict[str, Calls] = {}
        self.decided = 0

    def take(self) -> tuple[dict[str, Calls], int]:
        """What was counted since the last time, and how many rounds were decided; counting starts again."""
        taken = self.calls, self.decided
        self.calls, self.decided = {}, 0
        return taken

    def _count(self, kind: str, keys: Sequence[str], value: int = 0, received: int = 0) -> None:
        entry = self.calls.setdefault(kind, Calls())
        entry.calls += 1
        entry.keys += len(keys)
        entry.sent += sum(map(len, keys)) + value
        entry.received += received

    def set(self, key: str, value: str) -> None:
        """One message, no answer."""
        self._count("set", [key], len(value))
        self._store.set(key, value)

    def append(self, key: str, value: str) -> None:
        """One message, no answer."""
        self._count("append", [key], len(value))
        self._store.append(key, value)

    def get(self, key: str) -> bytes:
        """The value of a key; a TCPStore waits for it and then asks, which are two messages."""
        value: bytes = self._store.get(key)
        self._count("get", [key], 0, len(value))
        return value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """The values of keys; like `get`."""
        values: list[bytes] = self._store.multi_get(keys)
        self._count("multi_get", keys, 0, sum(map(len, values)))
        return values

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        self._count("check", keys, 0, 1)
        return bool(self._store.check(keys))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """An atomic decision, and with two empty texts a look at a key that may not be there."""
        value: bytes = self._store.compare_set(key, expected, desired)
        self._count("compare_set", [key], len(expected) + len(desired), len(value))
        if desired and key.endswith("/all") and value == desired.encode():
            self.decided += 1
        return value

    def add(self, key: str, amount: int) -> int:
        """Add to a counter."""
        self._count("add", [key], 8, 8)
        return int(self._store.add(key, amount))

    def delete_key(self, key: str) -> bool:
        """Remove a key."""
        self._count("delete_key", [key], 0, 1)
        return bool(self._store.delete_key(key))

    def has_extended_api(self) -> bool:
        """As the store says."""
        return bool(self._store.has_extended_api())
