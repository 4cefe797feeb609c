"""What the control plane of one process is doing: the capture guard, and a note for peers that wonder where we are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from commplane.agree.store import BoundedStore
from commplane.api import GroupKey
from commplane.errors import CaptureError

__all__ = ["Activity", "CaptureGuard", "Forming"]


class CaptureGuard:
    """Refuses control-plane calls while a capture is open: what runs inside is recorded, and a wait would never end."""

    def __init__(self) -> None:
        self.active = False

    def check(self, what: str) -> None:
        """Raise `CaptureError` if a capture is open."""
        if self.active:
            raise CaptureError(f"{what} inside a capture: do it before, a capture may only hold collectives")


@dataclass(frozen=True)
class Forming:
    """The attempt to form a communicator: the how many-th of its key on this rank, and where its first round is decided."""

    key: GroupKey
    instance: int
    decision: str


class Activity:
    """A note on the store for each rank: what it is doing in the control plane, for errors of those that wait for it."""

    def __init__(self, store: BoundedStore, rank: int, prefix: str) -> None:
        self._store = store
        self._rank = rank
        self._prefix = prefix

    def _put(self, text: str, forming: Forming | None = None, gone: bool = False) -> None:
        note: dict[str, Any] = {"text": text, "gone": gone, "forming": None}
        if forming is not None:
            note["forming"] = {
                "key": str(forming.key),
                "runs": forming.key.runs,
                "instance": forming.instance,
                "decision": forming.decision,
            }
        # A rank that forms is about to send its first record, and the note goes with it.
        send = self._store.set if forming is None else self._store.post
        send(f"{self._prefix}/{self._rank}", json.dumps(note))

    @contextmanager
    def forming(self, attempt: Forming) -> Iterator[None]:
        """While this rank waits for the others to form a communicator."""
        self._put(f"forms communicator {attempt.key}", attempt)
        try:
            yield
        except BaseException:
            self._put(f"failed to form communicator {attempt.key}")
            raise
        self._put(f"opened communicator {attempt.key}")

    def say(self, text: str, *, gone: bool = False) -> None:
        """Leave a note. `gone`: this rank takes part in nothing any more."""
        self._put(text, gone=gone)

    def read(self, rank: int) -> dict[str, Any] | None:
        """The note of another rank, or None if it left none."""
        found = self._store.peek(f"{self._prefix}/{rank}")
        return json.loads(found) if found else None

    def conflict(self, mine: GroupKey, waiting_for: Sequence[int], begun: Callable[[str], int]) -> str | None:
        """A reason why forming `mine` can never end: a peer waits for us in a communicator that we have not begun to form.

        This rank waits for that peer and the peer for this rank, so neither can go on; that is certain, not a time-out. The
        peer is told too, where its own first round is decided.

        Args:
            mine: what this rank forms.
            waiting_for: global ranks that have not come.
            begun: how many times this rank has begun to form the communicator with a key, given as text.
        """
        for peer in waiting_for:
            note = self.read(peer)
            theirs = None if note is None else note["forming"]
            if theirs is None or not any(first <= self._rank <= last for first, last in theirs["runs"]):
                continue
            if begun(theirs["key"]) >= theirs["instance"]:
                continue
            reason = (
                f"rank {self._rank} forms communicator {mine}, rank {peer} forms {theirs['key']}: every rank must create the "
                f"same communicators in the same order"
            )
            self._store.decide(theirs["decision"], json.dumps({"conflict": reason}))
            return reason
        return None
