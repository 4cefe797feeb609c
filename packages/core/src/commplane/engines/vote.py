"""One ballot a rank, over the store of the engine's default group: who has the adapter, which one, and whether it may work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from commplane.agree import REAL, Activity, BoundedStore, CaptureGuard, Clock, StoreBootstrap
from commplane.errors import AgreementError, PeerError

__all__ = ["Ballot", "active", "vote"]

Ballot = Mapping[str, "str | None"]
"""``adapter`` and ``engine``, each with its version, and ``problem``: why the adapter may not work here, or None."""


def vote(
    store: Any, rank: int, world_size: int, ballot: Ballot, timeout: float, who: str, fix: str, clock: Clock = REAL
) -> list[Ballot]:
    """Every rank's ballot by rank. Collective over `world_size` ranks.

    One round of the control plane, before there is a plane: its outcome is decided once, so all ranks return or all raise, also
    one that came too late. A rank may vote again on the same store, in a round of its own, if the others do too.

    Raises:
        PeerError: ranks did not vote within `timeout` seconds, or the store is gone; names them, `who` asks and `fix` says what
            to do.
    """
    bounded = BoundedStore(store, timeout, clock)
    try:
        prefix = f"vote/{bounded.add(f'votes/{rank}', 1)}"
        activity = Activity(bounded, rank, f"{prefix}/activity")
        activity.say("votes")
        control = StoreBootstrap(
            bounded, range(world_size), rank, prefix=prefix, timeout=timeout, who=who, guard=CaptureGuard(), activity=activity
        )
        ballots: list[Ballot] = control.all_gather(dict(ballot), what="vote")
        if any(b != ballots[0] for b in ballots):  # engines may end now: rank 0, whose process may host the store, does so last
            with suppress(PeerError):  # who is gone by then has its ballots
                control.farewell(timeout)
        return ballots
    except PeerError as error:
        raise PeerError(_absent(error, world_size, timeout, who, fix), error.missing_ranks) from error


def _absent(error: PeerError, world_size: int, timeout: float, who: str, fix: str) -> str:
    if not error.missing_ranks or error.__cause__ is not None:  # too late, or the store is gone and with it what ranks said
        return f"{error}: {fix}" if str(error).startswith(who) else f"{who} vote: {error}: {fix}"
    ranks = ", ".join(map(str, error.missing_ranks))
    return (
        f"{who} vote: wanted the adapter on all {world_size} ranks, found no answer from rank {ranks} within {timeout:g} s: {fix}"
    )


def active(ballots: Sequence[Ballot], who: str, fix: str) -> bool:
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
