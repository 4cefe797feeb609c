"""Who is gone, when a collective over several transports has failed: each of them knows a part of it.

Each rank that failed adds a line to one key: whom it suspects, and which processes it sees to have ended. The first rank that can
tell decides by one compare-and-set, so all ranks name the same ones. Nothing here is a round: a rank that is still at work, and
has not come to the collective, is neither waited for nor named unless somebody suspects it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from commplane.agree import StoreBootstrap
from commplane.api import Facts
from commplane.errors import PeerError

__all__ = ["Inquest", "named"]

# Between two looks at what other ranks said: as long as the control plane's own looks where it waits long.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.1
# Between two looks at who has ended. A host that goes down does not lose all of its processes in one moment.
_LOOK_EVERY_S = 0.25


def named(suspects: Sequence[Sequence[int]], present: Sequence[int], ended: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """Whom the reports so far name, in ascending order, and whether nothing more is to be waited for. Pure.

    Args:
        suspects: sets of ranks; a set is cleared by any of its ranks that is present.
        present: who reported.
        ended: whose process is known to have ended.
    """
    out: set[int] = set()
    sure = True
    for group in suspects:
        if any(r in present for r in group):
            continue
        dead = [r for r in group if r in ended]
        out.update(dead or group)
        sure = sure and len(dead) == len(group)
    return tuple(sorted(out)), sure


class Inquest:
    """Of one backend in one group, once: after it the backend is not used any more.

    Args:
        bootstrap: control plane whose store and clock are used.
        ranks: global ranks of the group.
        rank: global rank of this process.
        facts: of all ranks.
    """

    def __init__(self, bootstrap: StoreBootstrap, ranks: Sequence[int], rank: int, facts: Facts) -> None:
        self._bootstrap = bootstrap
        self._ranks = tuple(ranks)
        self._rank = rank
        self._facts = facts

    def find(self, suspects: Sequence[Sequence[int]], patience: float) -> tuple[int, ...] | None:
        """`InnerGroups.find_missing`."""
        try:
            return self._find([list(group) for group in suspects], patience)
        except PeerError:  # the store is gone, and with it perhaps the very host that is looked for
            return None

    def _find(self, suspects: list[list[int]], patience: float) -> tuple[int, ...]:
        clock, board = self._bootstrap.clock, self._bootstrap.board("inquest")
        others = [r for r in self._ranks if r != self._rank]
        deadline = clock.now() + patience
        look_at, pause = 0.0, _FIRST_PAUSE_S
        ended: tuple[int, ...] = ()
        told: tuple[int, ...] | None = None
        while True:
            if clock.now() >= look_at:
                ended = self._facts.dead(others)
                look_at = clock.now() + _LOOK_EVERY_S
            if ended != told:  # at first, and when it has changed
                board.add(json.dumps({"rank": self._rank, "suspects": suspects, "ended": list(ended)}))
                told = ended
            verdict = board.decision()
            if verdict:
                return tuple(json.loads(verdict))
            reports = [json.loads(line) for line in board.lines()]
            found, sure = named(
                [group for report in reports for group in report["suspects"]],
                [report["rank"] for report in reports],
                [r for report in reports for r in report["ended"]],
            )
            if sure or clock.now() >= deadline:
                return tuple(json.loads(board.decide(json.dumps(found))))
            clock.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_PAUSE_S)
