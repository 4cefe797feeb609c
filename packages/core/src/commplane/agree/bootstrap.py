"""The control plane over a `torch.distributed.Store`: gather at a leader, one publication a round.

Each rank writes one key and reads one; the leader, group rank 0, reads all keys and publishes the list. The cost of a round
grows linearly with ranks. The result of a round is decided once, by an atomic compare-and-set on its publication: either the
leader publishes the values, or the first rank whose patience ended publishes who is missing. So all ranks see one outcome.

torch is not imported here: any object with the methods of a c10d Store will do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from commplane.agree.guard import Activity, CaptureGuard
from commplane.errors import AgreementError, CommplaneError, PeerError

__all__ = ["PeerFailed", "StoreBootstrap"]

# Waiting is polling, with pauses that grow with the time waited. A blocking wait of a c10d TCPStore cannot be interrupted,
# holds its client against other threads of the process, and prints warnings when it times out. A pause is a third of the
# time waited so far: a rank that comes after t is noticed by 4/3 t, and a thousand ranks that wait for one ask the store a few
# times a second each.
_FIRST_PAUSE_S = 0.0001
_LONGEST_PAUSE_S = 0.25
# How often ranks that are late are looked up for a reason why they will never come.
_LOOK_EVERY_S = 0.5


class PeerFailed(AgreementError):
    """A rank said that it failed instead of coming to the round; the text has its reason."""


class StoreBootstrap:
    """`commplane.api.Bootstrap` over a store.

    Args:
        store: a c10d store shared by all ranks.
        ranks: global ranks in group order.
        rank: global rank of this process.
        prefix: key prefix; equal on all ranks of the group, used by no other group.
        timeout: seconds a round may take when the call does not say.
        who: how errors begin.
        guard: refuses rounds inside a capture.
        activity: notes of other ranks, shown when they are missing.
        conflict: looks for a reason why the ranks it is given will never come.
    """

    def __init__(
        self,
        store: Any,
        ranks: Sequence[int],
        rank: int,
        *,
        prefix: str,
        timeout: float,
        who: str,
        guard: CaptureGuard,
        activity: Activity,
        conflict: Callable[[Sequence[int]], str | None] | None = None,
    ) -> None:
        self._store = store
        self._ranks = tuple(ranks)
        self._rank = self._ranks.index(rank)
        self._prefix = prefix
        self._timeout = timeout
        self._who = who
        self._guard = guard
        self._activity = activity
        self._conflict = conflict
        self._seq = 0
        self._error: CommplaneError | None = None

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

    def child(self, name: str, *, who: str, timeout: float) -> StoreBootstrap:
        """A control plane over the same ranks that counts its own rounds. Local; same `name` on every rank."""
        return StoreBootstrap(
            self._store,
            self._ranks,
            self._ranks[self._rank],
            prefix=f"{self._prefix}/{name}",
            timeout=timeout,
            who=who,
            guard=self._guard,
            activity=self._activity,
        )

    def store(self, name: str) -> Any:
        """A `torch.distributed.PrefixStore` of this group's own. Local."""
        from torch.distributed import PrefixStore

        # A client of its own, where torch can make one: a transport's blocking wait holds its client, and our rounds would
        # wait with it.
        clone = getattr(self._store, "clone", None)
        return PrefixStore(f"{self._prefix}/store/{name}", self._store if clone is None else clone())

    def all_gather(self, value: Any, *, what: str, timeout: float | None = None, in_capture: bool = False) -> list[Any]:
        """Every rank's value, in group order. Collective."""
        return self._round({"value": value}, what, timeout, in_capture)

    def broadcast(self, value: Any, *, src: int = 0, what: str, timeout: float | None = None) -> Any:
        """The value of group rank `src`. Collective."""
        mine = value if self._rank == src else None
        return self._round({"value": mine}, what, timeout)[src]

    def barrier(self, *, what: str, timeout: float | None = None) -> None:
        """Return when all ranks have come here. Collective."""
        self._round({"value": None}, what, timeout)

    def fail(self, reason: str) -> None:
        """Tell the others, instead of coming to the next round, that this rank cannot go on. Local, does not wait."""
        if self._error is not None or self.world_size == 1:
            return
        self._error = PeerFailed(f"{self._who} gave up: {reason}")
        base = f"{self._prefix}/{self._seq}"
        self._store.set(f"{base}/{self._rank}", json.dumps({"failed": reason}))
        self._store.compare_set(f"{self._prefix}/failed", "", json.dumps({"failed": {str(self._rank): reason}}))
        # The leader's own failure has no reader but the publication itself.
        if self._rank == 0:
            self._publish(base, {"failed": {"0": reason}})

    def peer_failed(self) -> CommplaneError | None:
        """Whether some rank has called `fail`, for one that waits outside of a round. Local, does not wait."""
        key = f"{self._prefix}/failed"
        if self.world_size == 1 or not self._store.check([key]):
            return None
        return self._as_error(json.loads(self._store.get(key)), "stops")

    def farewell(self, timeout: float) -> None:
        """The last round: the leader leaves last, because its process may host the store. Collective."""
        self.barrier(what="close", timeout=timeout)
        if self.world_size == 1:
            return
        base = f"{self._prefix}/farewell"
        if self._rank != 0:
            self._store.set(f"{base}/{self._rank}", b"1")
            return
        self._wait([f"{base}/{r}" for r in range(1, self.world_size)], time.monotonic() + timeout, base)

    # One round.

    def _round(self, record: dict[str, Any], what: str, timeout: float | None, in_capture: bool = False) -> list[Any]:
        if not in_capture:
            self._guard.check(f"{self._who} {what}")
        if self._error is not None:
            raise self._error
        if self.world_size == 1:
            return [record["value"]]
        base = f"{self._prefix}/{self._seq}"
        patience = self._timeout if timeout is None else timeout
        deadline = time.monotonic() + patience
        try:
            self._store.set(f"{base}/{self._rank}", json.dumps(record))
            if self._rank == 0:
                outcome = self._lead(base, what, patience, deadline)
            else:
                outcome = self._follow(base, what, patience, deadline)
        except CommplaneError:
            raise
        except RuntimeError as error:  # c10d raises DistStoreError and DistNetworkError, both RuntimeErrors
            self._error = PeerError(
                f"{self._who} {what}: the store does not answer, its host (rank {self._ranks[0]} or the launcher) is "
                f"likely gone: {error}",
                [self._ranks[0]] if self._rank else [],
            )
            raise self._error from error
        self._seq += 1
        if "values" in outcome:
            return [v["value"] for v in outcome["values"]]
        self._error = self._as_error(outcome, what)
        raise self._error

    def _lead(self, base: str, what: str, patience: float, deadline: float) -> dict[str, Any]:
        keys = [f"{base}/{r}" for r in range(self.world_size)]
        stuck = self._wait(keys, deadline, base)
        if stuck is not None:
            return self._publish(base, stuck | {"patience": patience})
        records = [json.loads(raw) for raw in self._get(keys)]
        failed = {str(r): record["failed"] for r, record in enumerate(records) if "failed" in record}
        outcome = self._publish(base, {"failed": failed} if failed else {"values": records})
        if self._seq:  # all ranks are past the publication before this one: nobody reads it any more
            old = f"{self._prefix}/{self._seq - 1}"
            for key in [*(f"{old}/{r}" for r in range(self.world_size)), f"{old}/all"]:
                self._store.delete_key(key)
        return outcome

    def _follow(self, base: str, what: str, patience: float, deadline: float) -> dict[str, Any]:
        stuck = self._wait([f"{base}/all"], deadline, base)
        if stuck is not None:
            return self._publish(base, stuck | {"patience": patience})
        outcome: dict[str, Any] = json.loads(self._store.get(f"{base}/all"))
        return outcome

    def _publish(self, base: str, outcome: dict[str, Any]) -> dict[str, Any]:
        """Decide the round, unless somebody was first; returns what was decided."""
        won = self._store.compare_set(f"{base}/all", "", json.dumps(outcome))
        decided: dict[str, Any] = json.loads(won)
        return decided

    def _get(self, keys: Sequence[str]) -> list[bytes]:
        if self._store.has_extended_api():
            return list(self._store.multi_get(list(keys)))
        return [self._store.get(key) for key in keys]

    def _absent(self, base: str) -> list[int]:
        """Group ranks that have not come to the round at `base`."""
        return [r for r in range(self.world_size) if r != self._rank and not self._store.check([f"{base}/{r}"])]

    def _wait(self, keys: Sequence[str], deadline: float, base: str) -> dict[str, Any] | None:
        """Wait for all `keys`. None when they are there, else the outcome to publish for the round at `base`."""
        began = time.monotonic()
        look_at = began + _LOOK_EVERY_S
        while not self._store.check(list(keys)):
            now = time.monotonic()
            if now >= deadline:
                return {"missing": self._absent(base)}
            if now >= look_at:
                look_at = now + _LOOK_EVERY_S
                if self._store.check([f"{base}/all"]):  # another rank has decided the round
                    return {}
                if self._conflict is not None:
                    reason = self._conflict([self._ranks[r] for r in self._absent(base)])
                    if reason is not None:
                        return {"conflict": reason}
            time.sleep(min(max((now - began) / 3, _FIRST_PAUSE_S), _LONGEST_PAUSE_S, deadline - now))
        return None

    def _as_error(self, outcome: dict[str, Any], what: str) -> CommplaneError:
        if "conflict" in outcome:
            return AgreementError(f"{self._who} {what}: {outcome['conflict']}")
        if "failed" in outcome:
            reasons = {int(r): reason for r, reason in outcome["failed"].items()}
            text = "; ".join(f"rank {self._ranks[r]}: {reason}" for r, reason in sorted(reasons.items()))
            return PeerFailed(f"{self._who} {what}: {text}")
        missing = [self._ranks[r] for r in outcome["missing"] if r != self._rank]
        notes = []
        for r in missing:
            note = self._activity.read(r)
            notes.append(f"rank {r} {'left no trace' if note is None else 'last: ' + note['text']}")
        word = "ranks" if len(missing) != 1 else "rank"
        return PeerError(
            f"{self._who} {what}: waited {outcome['patience']:g} s for {word} {', '.join(map(str, missing)) or 'unknown'} "
            f"({'; '.join(notes)}); is the process alive and does it make the same calls? COMMPLANE_TIMEOUT sets the limit",
            missing,
        )
