"""Which of many ranks that wait looks up those that are late, so that not every one asks after every other.

In a small group each rank does. In a large one the rank that finds that nobody has looked since it did so itself takes its turn:
one look for all, and nobody has to stay alive for it. What only some other rank can judge, whether a late one waits for it
elsewhere, it is asked to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from commplane.agree.store import BoundedStore

__all__ = ["Watch"]

# Up to so many ranks, everybody looks for itself: sooner by one look, and the messages do not matter.
_SMALL = 16
# Ranks that are asked about one communicator that a late rank forms. One of them that has not begun it is enough, and others
# have their turn at the next look.
_ASKED = 4


class Watch:
    """The looks of one rank in one wait.

    Args:
        store: shared by the ranks.
        key: where the last look is noted; of this round alone.
        rank: group rank.
        ranks: global ranks in group order.
    """

    def __init__(self, store: BoundedStore, key: str, rank: int, ranks: Sequence[int]) -> None:
        self._store = store
        self._key = key
        self._rank = rank
        self._ranks = ranks
        self._seen = b""
        self._looks = 0
        self._everybody = len(ranks) <= _SMALL

    def my_turn(self) -> bool:
        """Whether this rank is to look up all that are late; if not, another has since the last call."""
        if self._everybody:
            return True
        self._looks += 1
        found = self._store.peek(self._key)
        if found == self._seen:
            mine = json.dumps({"by": self._rank, "look": self._looks})
            found = self._store.swap(self._key, found.decode(), mine)
            if found == mine.encode():
                self._seen = found
                return True
        self._seen = found
        return False

    def ask(self, absent: Sequence[int], notes: Mapping[int, Mapping[str, Any] | None]) -> None:
        """After a look: have ranks that are here judge late ones that form another communicator with them.

        Args:
            absent: group ranks that are late.
            notes: of those, by group rank.
        """
        if self._everybody:
            return
        late = set(absent)
        places = {rank: i for i, rank in enumerate(self._ranks) if i not in late}
        asked: dict[int, list[int]] = {}
        known = set()
        for peer in absent:
            forming = (notes.get(peer) or {}).get("forming")
            # One of those that form the same stands for all of them.
            if forming is None or (attempt := (forming["key"], forming["instance"])) in known:
                continue
            known.add(attempt)
            here = [places[r] for first, last in forming["runs"] for r in range(first, last + 1) if r in places]
            turn = self._looks * _ASKED % max(1, len(here))
            for r in (here[turn:] + here[:turn])[:_ASKED]:
                asked.setdefault(r, []).append(peer)
        text = json.dumps({"by": self._rank, "look": self._looks, "ask": asked})
        self._store.set(self._key, text)
        self._seen = text.encode()

    def asked(self) -> list[int]:
        """The late group ranks that the last look asks this rank to judge."""
        return list(json.loads(self._seen).get("ask", {}).get(str(self._rank), [])) if self._seen else []
