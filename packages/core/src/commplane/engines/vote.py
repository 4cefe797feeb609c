"""One ballot a rank, over the store of the engine's default group: who has the adapter, which one, and whether it may work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from commplane.errors import AgreementError, PeerError

__all__ = ["active", "vote"]

_PAUSE_S = 0.01


def vote(
    store: Any,
    rank: int,
    world_size: int,
    ballot: Mapping[str, str | None],
    timeout: float,
    who: str,
    fix: str,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[dict[str, str | None]]:
    """Every rank's ballot by rank. Collective over `world_size` ranks; `store` is used for this vote alone.

    The outcome is decided once, by a compare-and-set: all ranks return, or all raise, also the one that came too late.

    Raises:
        PeerError: ranks did not vote within `timeout` seconds, or the store is gone; names them, `who` asks and `fix` says what
            to do.
    """
    keys = [f"ballot/{r}" for r in range(world_size)]
    end = now() + timeout
    try:
        store.set(keys[rank], json.dumps(dict(ballot)))
        # Polled: a blocking wait holds the store's one connection, which threads of the engine use too.
        while not store.check(keys) and not store.check(["outcome"]) and now() < end:
            sleep(_PAUSE_S)
        absent = [] if store.check(keys) else [r for r, key in enumerate(keys) if not store.check([key])]
        missing: list[int] = json.loads(store.compare_set("outcome", "", json.dumps(absent)))
        if not missing:
            return [json.loads(store.get(key)) for key in keys]
    except RuntimeError as lost:
        raise PeerError(f"{who} vote: wanted the store of the default group, found that it is gone ({lost}): {fix}") from lost
    raise PeerError(
        f"{who} vote: wanted the adapter on all {world_size} ranks, found no answer from rank "
        f"{', '.join(map(str, missing))} within {timeout:g} s: {fix}",
        missing,
    )


def active(ballots: Sequence[Mapping[str, str | None]], who: str, fix: str) -> bool:
    """Whether the adapter works on all ranks (True) or on none (False). Pure, so the same on every rank.

    Raises:
        AgreementError: on some ranks only, or not the same adapter; shows what each said.
    """
    if all(b["problem"] is not None for b in ballots):
        return False
    said = {r: b["problem"] or f"{b['adapter']} for {b['engine']}" for r, b in enumerate(ballots)}
    if len(set(said.values())) == 1:
        return True
    ranks: dict[str, list[int]] = {}
    for r, text in said.items():
        ranks.setdefault(text, []).append(r)
    shown = "; ".join(f"rank {', '.join(map(str, rs))}: {text}" for text, rs in ranks.items())
    raise AgreementError(f"{who} vote: wanted the same adapter at work on all ranks, found {shown}: {fix}")
