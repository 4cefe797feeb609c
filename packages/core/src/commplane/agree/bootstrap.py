"""The control plane over a `torch.distributed.Store`: gather at a leader, one publication a round.

Each rank writes one key and reads one; the leader, group rank 0, reads all keys and publishes the list. The cost of a round
grows linearly with ranks. The result of a round is decided once, by an atomic compare-and-set on its publication: either the
leader publishes the values, or the first rank whose patience ended publishes who is missing. So all ranks see one outcome.

torch is not imported here: any object with the methods of a c10d Store will do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from commplane.agree.clock import Clock
from commplane.agree.guard import Activity, CaptureGuard
from commplane.agree.store import BoundedStore
from commplane.errors import AgreementError, CommplaneError, PeerError

__all__ = ["PeerFailed", "StoreBootstrap"]

# Waiting is polling, with pauses that grow with the time waited. A blocking wait of a c10d TCPStore cannot be interrupted,
# holds its client against other threads of the process, and prints warnings when it times out. A pause is a third of the
# time waited so far: a rank that comes after t is noticed by 4/3 t, and a thousand ranks that wait for one ask the store a
# few times a second each.
_FIRST_PAUSE_S = 0.0001
_LONGEST_PAUSE_S = 0.25
# How often ranks that are late are looked up for a reason why they will never come.
_LOOK_EVERY_S = 0.5


class PeerFailed(AgreementError):
    """A rank said that it failed instead of coming to the round; the text has its reason."""


class StoreBootstrap:
    """`commplane.api.Bootstrap` over a store.

    Args:
        store: a store shared by all ranks.
        ranks: global ranks in group order.
        rank: global rank of this process.
        prefix: key prefix; equal on all ranks of the group, used by no other group.
        timeout: seconds a round may take when the call does not say.
        who: how errors begin.
        guard: refuses rounds inside a capture.
        activity: notes of other ranks, shown when they are missing.
        conflict: looks for a reason why the ranks it is given will never come.
        dead: which of the ranks it is given have ended, as far as this process can tell.
    """

    def __init__(
        self,
        store: BoundedStore,
        ranks: Sequence[int],
        rank: int,
        *,
        prefix: str,
        timeout: float,
        who: str,
        guard: CaptureGuard,
        activity: Activity,
        conflict: Callable[[Sequence[int]], str | None] | None = None,
        dead: Callable[[Sequence[int]], Sequence[int]] = lambda _ranks: (),
    ) -> None:
        self._store = store
        self._clock = store.clock
        self._ranks = tuple(ranks)
        self._rank = self._ranks.index(rank)
        self._root = self._prefix = prefix
        self._timeout = timeout
        self._who = who
        self._guard = guard
        self._activity = activity
        self._conflict = conflict
        self._dead = dead
        self._seq = 0
        self._error: CommplaneError | None = None
        self._look_at = 0.0  # when `peer_failed` looks for ranks that have ended the next time

    @property
    def rank(self) -> int:
        """Group rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""
        return len(self._ranks)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Global ranks in group order."""
        return self._ranks

    @property
    def clock(self) -> Clock:
        """By which this control plane waits."""
        return self._clock

    @property
    def first_decision(self) -> str:
        """The key that the first round is decided at."""
        return f"{self._root}/0/all"

    def child(self, name: str, *, who: str, timeout: float) -> StoreBootstrap:
        """A control plane over the same ranks that counts its own rounds. Local; same `name` on every rank."""
        return StoreBootstrap(
            self._store,
            self._ranks,
            self._ranks[self._rank],
            prefix=f"{self._root}/{name}",
            timeout=timeout,
            who=who,
            guard=self._guard,
            activity=self._activity,
            dead=self._dead,
        )

    def begin(self, step: str) -> None:
        """Start afresh, at round 0 of `step`, whatever went wrong before. Local; same `step` on every rank, used once."""
        self._prefix = f"{self._root}/{step}"
        self._seq = 0
        self._error = None

    def store(self, name: str) -> Any:
        """A `torch.distributed.PrefixStore` of this group's own. Local."""
        from torch.distributed import PrefixStore

        # A client of its own, where torch can make one: a transport's blocking wait holds its client, and our rounds would
        # wait with it.
        clone = getattr(self._store.raw, "clone", None)
        return PrefixStore(f"{self._prefix}/store/{name}", self._store.raw if clone is None else clone())

    def all_gather(self, value: Any, *, what: str, timeout: float | None = None) -> list[Any]:
        """Every rank's value, in group order. Collective."""
        return self._round(value, what, timeout)

    def broadcast(self, value: Any, *, src: int = 0, what: str, timeout: float | None = None) -> Any:
        """The value of group rank `src`. Collective."""
        return self._round(value if self._rank == src else None, what, timeout)[src]

    def barrier(self, *, what: str, timeout: float | None = None) -> None:
        """Return when all ranks have come here. Collective."""
        self._round(None, what, timeout)

    def fail(self, reason: str) -> None:
        """Tell the others, instead of coming to the next round, that this rank cannot go on. Local, does not wait."""
        if self._error is not None or self.world_size == 1:
            return
        self._error = PeerFailed(f"{self._who} gave up: {reason}")
        base = f"{self._prefix}/{self._seq}"
        outcome = json.dumps({"failed": {str(self._rank): reason}})
        try:
            self._store.set(f"{base}/{self._rank}", json.dumps({"failed": reason}))
            self._store.decide(f"{self._prefix}/failed", outcome)
            # The leader's own failure has no reader but the publication itself.
            if self._rank == 0:
                self._store.decide(f"{base}/all", outcome)
        except PeerError:  # the store is gone: the others find that out themselves, and the caller has its own reason
            return

    def peer_failed(self) -> CommplaneError | None:
        """Whether some rank has called `fail` or has ended, for one that waits outside of a round. Local, does not wait."""
        if self.world_size == 1:
            return None
        key = f"{self._prefix}/failed"
        try:
            if self._store.check([key]):
                return self._as_error(json.loads(self._store.get(key)), "stops")
        except PeerError as lost:
            return lost
        now = self._clock.now()
        if now < self._look_at:
            return None
        self._look_at = now + _LOOK_EVERY_S
        ended = self._dead([r for i, r in enumerate(self._ranks) if i != self._rank])
        if not ended:
            return None
        names = f"{'rank' if len(ended) == 1 else 'ranks'} {', '.join(map(str, ended))}"
        return PeerError(f"{self._who} stops: the process of {names} has ended", ended)

    def farewell(self, timeout: float) -> None:
        """The last round: the leader leaves last, because its process may host the store. Collective."""
        self.barrier(what="close", timeout=timeout)
        if self.world_size == 1:
            return
        base = f"{self._prefix}/farewell"
        if self._rank != 0:
            self._store.set(f"{base}/{self._rank}", "1")
            return
        self._wait([f"{base}/{r}" for r in range(1, self.world_size)], self._clock.now() + timeout, base)

    # One round.

    def _round(self, value: Any, what: str, timeout: float | None) -> list[Any]:
        self._guard.check(f"{self._who} {what}")
        if self._error is not None:
            raise self._error
        if self.world_size == 1:
            return [value]
        base = f"{self._prefix}/{self._seq}"
        patience = self._timeout if timeout is None else timeout
        deadline = self._clock.now() + patience
        record = json.dumps({"value": value, "what": what})
        try:
            self._store.set(f"{base}/{self._rank}", record)
            outcome = self._lead(base, patience, deadline) if self._rank == 0 else self._follow(base, patience, deadline)
        except PeerError as lost:
            self._error = PeerError(f"{self._who} {what}: {lost}", [self._ranks[0]] if self._rank else [])
            raise self._error from lost
        except BaseException as error:  # Ctrl-C: the record is out, so this rank no longer knows at which round it is
            self._error = PeerFailed(f"{self._who} {what} was interrupted by {type(error).__name__}: start over")
            raise
        self._seq += 1
        if "values" in outcome:
            return list(outcome["values"])
        self._error = self._as_error(outcome, what)
        raise self._error

    def _lead(self, base: str, patience: float, deadline: float) -> dict[str, Any]:
        keys = [f"{base}/{r}" for r in range(self.world_size)]
        stuck = self._wait(keys, deadline, base)
        if stuck is not None:
            return self._publish(base, stuck | {"patience": patience})
        records = [json.loads(raw) for raw in self._store.get_all(keys)]
        failed = {str(r): record["failed"] for r, record in enumerate(records) if "failed" in record}
        if failed:
            return self._publish(base, {"failed": failed})
        steps = {self._ranks[r]: record["what"] for r, record in enumerate(records)}
        if len(set(steps.values())) > 1:
            shown = ", ".join(f"rank {r} in {what!r}" for r, what in steps.items())
            return self._publish(base, {"conflict": f"ranks make different calls: {shown}"})
        outcome = self._publish(base, {"values": [record["value"] for record in records]})
        if self._seq:  # all ranks are past the publication before this one: nobody reads it any more
            old = f"{self._prefix}/{self._seq - 1}"
            self._store.delete([*(f"{old}/{r}" for r in range(self.world_size)), f"{old}/all"])
        return outcome

    def _follow(self, base: str, patience: float, deadline: float) -> dict[str, Any]:
        stuck = self._wait([f"{base}/all"], deadline, base)
        if stuck is not None:
            return self._publish(base, stuck | {"patience": patience})
        outcome: dict[str, Any] = json.loads(self._store.get(f"{base}/all"))
        return outcome

    def _publish(self, base: str, outcome: dict[str, Any]) -> dict[str, Any]:
        """Decide the round, unless somebody was first; returns what was decided."""
        decided: dict[str, Any] = json.loads(self._store.decide(f"{base}/all", json.dumps(outcome)))
        return decided

    def _absent(self, base: str) -> list[int]:
        """Group ranks that have not come to the round at `base`."""
        return [r for r in range(self.world_size) if r != self._rank and not self._store.check([f"{base}/{r}"])]

    def _leader(self) -> list[int]:
        """Group rank 0 as one that is waited for: its record may be there, and what it has to publish is not."""
        return [0] if self._rank else []

    def _wait(self, keys: Sequence[str], deadline: float, base: str) -> dict[str, Any] | None:
        """Wait for all `keys`. None when they are there, else the outcome to publish for the round at `base`."""
        began = self._clock.now()
        look_at = began + _LOOK_EVERY_S
        while not self._store.check(keys):
            now = self._clock.now()
            if now >= deadline:
                return {"missing": self._absent(base) or self._leader()}
            if now >= look_at:
                look_at = now + _LOOK_EVERY_S
                hopeless = self._look(base)
                if hopeless is not None:
                    return hopeless
            self._clock.sleep(min(max((now - began) / 3, _FIRST_PAUSE_S), _LONGEST_PAUSE_S, deadline - now))
        return None

    def _look(self, base: str) -> dict[str, Any] | None:
        """Why waiting any longer is of no use, as the outcome of the round; None if it may still be."""
        if self._store.check([f"{base}/all"]):  # another rank has decided the round
            return {}
        absent = self._absent(base)
        awaited = sorted({*absent, *self._leader()})
        ended = set(self._dead([self._ranks[r] for r in awaited]))
        gone = [r for r in awaited if self._ranks[r] in ended or (self._activity.read(self._ranks[r]) or {}).get("gone")]
        if gone:
            return {"missing": gone, "ended": [self._ranks[r] for r in gone]}
        reason = self._conflict([self._ranks[r] for r in absent]) if self._conflict is not None else None
        return None if reason is None else {"conflict": reason}

    def _as_error(self, outcome: dict[str, Any], what: str) -> CommplaneError:
        if "conflict" in outcome:
            return AgreementError(f"{self._who} {what}: {outcome['conflict']}")
        if "failed" in outcome:
            reasons = {int(r): reason for r, reason in outcome["failed"].items()}
            text = "; ".join(f"rank {self._ranks[r]}: {reason}" for r, reason in sorted(reasons.items()))
            return PeerFailed(f"{self._who} {what}: {text}")
        missing = [self._ranks[r] for r in outcome["missing"] if r != self._rank]
        patience = f"{outcome['patience']:g} s"
        if not missing:
            return PeerError(f"{self._who} {what}: came after the others had given up waiting for it ({patience})")
        notes = []
        for r in missing:
            note = self._activity.read(r)
            ended = " has ended," if r in outcome.get("ended", ()) else ""
            notes.append(f"rank {r}{ended} {'left no trace' if note is None else 'last: ' + note['text']}")
        names = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}"
        if "ended" in outcome:
            return PeerError(f"{self._who} {what}: {names} will not come ({'; '.join(notes)})", missing)
        return PeerError(
            f"{self._who} {what}: waited {patience} for {names} ({'; '.join(notes)}); is the process alive and does it make the "
            f"same calls? COMMPLANE_TIMEOUT sets the limit",
            missing,
        )
