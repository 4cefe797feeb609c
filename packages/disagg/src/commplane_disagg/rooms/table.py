"""The rooms of one rank, and how the ranks of its group come to one status for each. Pure: no clock, no socket.

Once a step every rank gives `votes` to one sync round and what was agreed to `settle`; the ranks' tables are then equal in all
that can be seen. Rooms are opened in the same order on every rank of the group, not in the same step: a room takes part once the
slowest rank has opened it. What stands in a vote for a room:

===============  ==============================================
failed here      negative: the reason, then the rank; MIN takes the greatest reason, of the lowest rank
going on         this rank's own status, NEW to SUCCESS
no room          above all of these
===============  ==============================================

A room that failed leaves its place at once, so that rooms which nobody answers for hold up no others. The text of its failure is
told in a step after that, by the rank whose reason was taken; then it is asked about, in turns with others like it, until all
ranks say that no write of it can land any more.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from commplane.api import Agreed
from commplane.errors import CommplaneError
from commplane_disagg.rooms.schema import CAPACITY, DRAINS, LANES, LIFTS, ROOMS, TEXT_WORDS
from commplane_disagg.rooms.state import Cause, Key, Reason, Room, Status
from commplane_disagg.rooms.turns import Turns

__all__ = ["Change", "RoomTable"]

_FREE = 1 << 20
_RANKS = 1 << 20
_DRAINING, _STUCK, _DRAINED = range(3)
_REMEMBERED = 1 << 16


@dataclass(frozen=True)
class Change:
    """Something agreed on by all ranks of the group, in the same step on all of them.

    Attributes:
        room: which one.
        kind: ``"failed"``: stop, and see to it that no write can land any more; ``"error"``: the error of a failed room is known;
            ``"success"``; ``"quarantined"``; ``"released"``: the pages may be used again.
    """

    room: Room
    kind: str


class RoomTable:
    """All rooms of one rank.

    Args:
        rank: group rank.
        world_size: ranks of the group.
        who: begins error texts, such as ``"decode rank 1/4"``.
    """

    def __init__(self, rank: int, world_size: int, who: str) -> None:
        self.rank, self.world_size, self.who = rank, world_size, who
        self.rooms: dict[int, Room] = {}
        self.digest = 0
        self.counts = dict.fromkeys(("success", "failed", "released", "quarantined", "lifted"), 0)
        self._ended: OrderedDict[int, tuple[int, Cause | None]] = OrderedDict()
        self._opened = 0
        self._admitted = 0
        self._queue: deque[Room] = deque()
        self._slots: list[Room | None] = [None] * CAPACITY
        self._untold: deque[tuple[Room, Reason, int]] = deque()
        self._heard = 0
        self._draining: Turns[Room] = Turns(DRAINS)
        self._quarantine: Turns[Room] = Turns(LIFTS)

    def open(self, key: Key) -> Room:
        """A new room. Local; every rank of the group opens the same rooms in the same order.

        Raises:
            CommplaneError: the room is in use, or this or a later generation of it was.
        """
        old = self.rooms.get(key.room)
        if old is not None:
            raise CommplaneError(f"{self.who} {key}: {old.key} is still {old.status.name}; wait until it is released")
        ended = self._ended.get(key.room)
        if ended is not None and key.generation <= ended[0]:
            raise CommplaneError(
                f"{self.who} {key}: generation {ended[0]} of this room is over; use a generation above {ended[0]} on both sides"
            )
        room = self.rooms[key.room] = Room(key)
        self._opened += 1
        self._queue.append(room)
        return room

    def get(self, key: Key) -> Room | None:
        """The live room of this key: none of another generation."""
        room = self.rooms.get(key.room)
        return room if room is not None and room.key == key else None

    def ended(self, key: Key) -> bool | None:
        """How a room ended that is gone: True for success. None: it never was, or is not remembered, or lives.

        A generation below the last one that ended counts as failed.
        """
        generation, cause = self._ended.get(key.room, (-1, None))
        if key.generation > generation:
            return None
        return cause is None and key.generation == generation

    def epitaph(self, key: Key) -> Cause | None:
        """Why a room failed that is gone, as far as remembered."""
        generation, cause = self._ended.get(key.room, (-1, None))
        return cause if key.generation == generation else None

    def quarantined(self) -> tuple[Room, ...]:
        """Rooms whose pages nobody may use, oldest first; the same on every rank of the group."""
        return tuple(self._quarantine)

    def alone(self) -> tuple[Room, ...]:
        """Rooms that are open here, and were not on all ranks of the group when it last agreed; oldest first. Local."""
        return tuple(islice(self._queue, self._heard - self._admitted, None))

    def votes(self) -> dict[str, int | Sequence[int]]:
        """What this rank gives to the next sync round. Local."""
        text: list[int] = []
        for room, _, rank in self._lanes():
            text += _words(_told(room.cause) if rank == self.rank else "")
        return {
            f"{ROOMS.name}.opened": self._opened,
            f"{ROOMS.name}.status": _padded([_FREE if r is None else self._word(r) for r in self._slots], CAPACITY, _FREE),
            f"{ROOMS.name}.text": text + [0] * (LANES * TEXT_WORDS - len(text)),
            f"{ROOMS.name}.drain": _padded([self._drain(room) for room in self._draining.window()], DRAINS),
            f"{ROOMS.name}.lift": _padded([int(room.drained) for room in self._quarantine.window()], LIFTS),
        }

    def settle(self, agreed: Agreed) -> list[Change]:
        """Take in what the round of the last `votes` agreed on. Local, equal on all ranks."""
        changes: list[Change] = []
        # In this order, so that each finds the rooms that the votes were about.
        self._lift(_several(agreed[f"{ROOMS.name}.lift"]), changes)
        self._drained(_several(agreed[f"{ROOMS.name}.drain"]), changes)
        self._tell(_several(agreed[f"{ROOMS.name}.text"]), changes)
        for slot, word in zip(range(len(self._slots)), _several(agreed[f"{ROOMS.name}.status"]), strict=False):
            room = self._slots[slot]
            if room is not None:
                self._move(slot, room, word, changes)
        self._admit(int(_one(agreed[f"{ROOMS.name}.opened"])))
        for change in changes:
            self._note(change.kind, change.room.key)
        return changes

    def _word(self, room: Room) -> int:
        if room.cause is not None:
            return self.rank - room.cause.reason * _RANKS
        return room.local

    def _drain(self, room: Room) -> int:
        return _DRAINED if room.drained else _STUCK if room.stuck else _DRAINING

    def _move(self, slot: int, room: Room, word: int, changes: list[Change]) -> None:
        if word <= 0:
            reason = Reason((_RANKS - 1 - word) // _RANKS)
            rank = word + reason * _RANKS
            room.status = Status.FAILED
            if room.cause is None:
                room.cause = Cause(reason, "", "")
            self._untold.append((room, reason, rank))
            self._slots[slot] = None
            self.counts["failed"] += 1
            changes.append(Change(room, "failed"))
        elif word < Status.SUCCESS:
            room.status = Status(word)
        elif word == Status.SUCCESS:
            room.status = Status.SUCCESS
            self.counts["success"] += 1
            changes.append(Change(room, "success"))
            self._release(room, changes, ok=True)
            self._slots[slot] = None

    def _release(self, room: Room, changes: list[Change], *, ok: bool) -> None:
        room.status = Status.RELEASED
        self.counts["released"] += 1
        del self.rooms[room.key.room]
        self._ended[room.key.room] = (room.key.generation, None if ok else room.cause)
        self._ended.move_to_end(room.key.room)
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
        changes.append(Change(room, "released"))

    def _admit(self, opened: int) -> None:
        self._heard = opened
        for slot, taken in enumerate(self._slots):
            if self._admitted >= opened:
                return
            if taken is None:
                room = self._queue.popleft()
                self._slots[slot] = room
                self._admitted += 1
                self._note("admitted", room.key)

    def _lanes(self) -> list[tuple[Room, Reason, int]]:
        return [self._untold[i] for i in range(min(LANES, len(self._untold)))]

    def _tell(self, words: Sequence[int], changes: list[Change]) -> None:
        for lane, (room, reason, rank) in enumerate(self._lanes()):
            said = _text(words[lane * TEXT_WORDS : (lane + 1) * TEXT_WORDS])
            text = f"{self.who} {room.key} failed ({reason.words}, first on rank {rank}): {said}"
            room.error = reason.error(text)
            if not room.is_explained:
                origin, _, told = said.partition(": ")
                room.cause = Cause(reason, origin or "?", told)
            # Only now, so that an engine hears of a failure before it has the pages back.
            room.status = Status.DRAINING
            self._draining.append(room)
            changes.append(Change(room, "error"))
            self._untold.popleft()

    def _drained(self, words: Sequence[int], changes: list[Change]) -> None:
        window = self._draining.window()
        over = [(room, word) for room, word in zip(window, words, strict=False) if word > _DRAINING]
        self._draining.turn([room for room, _ in over])
        for room, word in over:
            if word == _DRAINED:
                self._release(room, changes, ok=False)
            else:
                room.status = Status.QUARANTINED
                self.counts["quarantined"] += 1
                self._quarantine.append(room)
                changes.append(Change(room, "quarantined"))

    def _lift(self, clean: Sequence[int], changes: list[Change]) -> None:
        lifted = [room for room, ok in zip(self._quarantine.window(), clean, strict=False) if ok]
        self._quarantine.turn(lifted)
        for room in lifted:
            self.counts["lifted"] += 1
            self._release(room, changes, ok=False)

    def _note(self, kind: str, key: Key) -> None:
        line = f"{self.digest} {kind} {key.room} {key.generation}".encode()
        self.digest = int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big") >> 2


def _told(cause: Cause | None) -> str:
    return f"{cause.origin}: {cause.text}" if cause is not None else ""


def _words(text: str) -> list[int]:
    data = text.encode()[: TEXT_WORDS * 7]
    return [int.from_bytes(data[i * 7 : i * 7 + 7].ljust(7, b"\0"), "big") for i in range(TEXT_WORDS)]


def _text(words: Sequence[int]) -> str:
    return b"".join(int(w).to_bytes(7, "big") for w in words).rstrip(b"\0").decode(errors="replace")


def _padded(values: list[int], count: int, value: int = 0) -> list[int]:
    return values + [value] * (count - len(values))


def _several(value: Any) -> Sequence[int]:
    return value  # type: ignore[no-any-return]


def _one(value: Any) -> int:
    return value  # type: ignore[no-any-return]
