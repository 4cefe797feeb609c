"""What the control plane of one process is doing: the capture guard, and a note for peers that wonder where we are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from commplane.api import GroupKey
from commplane.errors import CaptureError

__all__ = ["Activity", "CaptureGuard"]


class CaptureGuard:
    """Refuses control-plane calls while a capture is open: what runs inside is recorded, and a wait would never end."""

    def __init__(self) -> None:
        self.active = False

    def check(self, what: str) -> None:
        """Raise `CaptureError` if a capture is open."""
        if self.active:
            raise CaptureError(f"{what} inside a capture: do it before, a capture may only hold collectives")


class Activity:
    """A note on the store for each rank: what it is doing in the control plane, for errors of those that wait for it."""

    def __init__(self, store: Any, rank: int) -> None:
        self._store = store
        self._rank = rank

    def _put(self, text: str, forming: GroupKey | None = None) -> None:
        note = {"text": text, "forming": forming and {"key": str(forming), "ranks": list(forming.ranks)}}
        self._store.set(f"activity/{self._rank}", json.dumps(note))

    @contextmanager
    def forming(self, key: GroupKey) -> Iterator[None]:
        """While this rank waits for the others to form the communicator `key`.

        The note stays when forming fails, so that peers stuck in another group can still read the difference.
        """
        self._put(f"forms communicator {key}", key)
        yield
        self._put(f"opened communicator {key}")

    def say(self, text: str) -> None:
        """Leave a note."""
        self._put(text)

    def read(self, rank: int) -> dict[str, Any] | None:
        """The note of another rank, or None if it left none."""
        key = f"activity/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def conflict(self, key: GroupKey, waiting_for: Sequence[int]) -> str | None:
        """A reason why forming `key` can never end: a peer waits for us in another communicator.

        This rank waits for that peer and the peer for this rank, so neither can go on; that is certain, not a time-out.
        """
        for peer in waiting_for:
            note = self.read(peer)
            if note is None or note["forming"] is None or note["forming"]["key"] == str(key):
                continue
            if self._rank in note["forming"]["ranks"]:
                return (
                    f"rank {self._rank} forms communicator {key}, rank {peer} forms {note['forming']['key']}: every rank must "
                    f"create the same communicators in the same order"
                )
        return None
