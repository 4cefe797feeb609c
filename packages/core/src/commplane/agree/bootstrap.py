"""The control plane over a `torch.distributed.Store`: gather at a leader, one publication a round.

Each rank adds one line to a key that the leader, group rank 0, reads; at another key the leader publishes all values, each
different one once. The messages of a round grow linearly with ranks, also while some are late. The result of a round is decided
once, by an atomic compare-and-set on its publication: either the leader publishes the values, or the first rank whose patience
ended publishes who is missing. So all ranks see one outcome.

torch is not imported here: any object with the methods of a c10d Store will do.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from commplane.agree.board import Board
from commplane.agree.clock import Clock
from commplane.agree.guard import Activity, CaptureGuard
from commplane.agree.pack import pack, unpack
from commplane.agree.store import BoundedStore
from commplane.agree.watch import Watch
from commplane.errors import AgreementError, CommplaneError, PeerError
from commplane.select import Gathered

__all__ = ["PeerFailed", "StoreBootstrap"]

# Waiting is polling, with pauses that grow with the time waited. A blocking wait of a c10d TCPStore cannot be interrupted,
# holds its client against other threads of the process, and prints warnings when it times out. A pause is a third of the
# time waited so far: a rank that comes after t is noticed by 4/3 t. A store makes one call after the other, some 25 us each, so
# that nothing can be there before it has heard of every rank; and many ranks that wait for one that is late leave it time to
# spare: their pauses are half of what they have waited.
_FIRST_PAUSE_S = 0.0001
_FIRST_PAUSE_PER_RANK_S = 0.000025
_LONGEST_PAUSE_S = 0.25
_LONGEST_PAUSE_PER_RANK_S = 0.001
# Where many ranks share cores a round takes longer than that, and the next one takes as long: half of what this rank waited in
# the last is the first pause, up to this limit, so that one late rank does not make all that follows slow.
_KNOWN_PAUSE_PER_RANK_S = 0.0002
_MANY = 16
# A record longer than this lies at a key of its own, named by its hash: the leader, which looks at all records until the last is
# there, reads equal ones once.
_LONG_RECORD = 1024
# How often ranks that are late are looked up for a reason why they will never come.
_LOOK_EVERY_S = 0.5


# What may be one object for all ranks, because nobody can change it.
_PLAIN = (str, int, float, type(None))


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
        # When `peer_failed` asks the store the next time, and when it looks for ranks that have ended.
        self._ask_at = self._look_at = 0.0 if len(self._ranks) <= _MANY else self._clock.now() + _LOOK_EVERY_S
        self._looks = 0
        self._used: list[str] = []  # keys of the round before, which this rank removes
        self._led: list[StoreBootstrap] = []

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

    def part(self, name: str, ranks: Sequence[int], *, who: str) -> StoreBootstrap:
        """A control plane over some of the ranks, as global ones, this one among them. Local; same `name` on each of these."""
        rank = self._ranks[self._rank]
        root, store, timeout = f"{self._root}/{name}", self._store, self._timeout
        return StoreBootstrap(
            store, ranks, rank, prefix=root, timeout=timeout, who=who, guard=self._guard, activity=self._activity, dead=self._dead
        )

    def lead(self, other: StoreBootstrap) -> None:
        """From now on `begin` and `fail` are `other`'s, too. Local."""
        self._led.append(other)

    def board(self, name: str) -> Board:
        """Where ranks leave lines without a round. Local; same `name` on every rank."""
        return Board(self._store, f"{self._root}/board/{name}")

    def begin(self, step: str) -> None:
        """Start afresh, at round 0 of `step`, whatever went wrong before. Local; same `step` on every rank, used once."""
        self._prefix = f"{self._root}/{step}"
        self._seq = 0
        self._error = None
        for other in self._led:
            other.begin(step)

    def store(self, name: str) -> Any:
        """A `torch.distributed.PrefixStore` of this group's own. Local."""
        from torch.distributed import PrefixStore

        # A client of its own, where torch can make one: a transport's blocking wait holds its client, and our rounds would
        # wait with it.
        clone = getattr(self._store.raw, "clone", None)
        return PrefixStore(f"{self._prefix}/store/{name}", self._store.raw if clone is None else clone())

    def all_gather(self, value: Any, *, what: str, timeout: float | None = None) -> list[Any]:
        """Every rank's value, in group order. Collective."""
        return [v if isinstance(v, _PLAIN) else deepcopy(v) for v in self._round(value, what, timeout)]

    def gather(self, value: Any, *, what: str, timeout: float | None = None) -> Gathered:
        """`all_gather` for a thousand ranks that mostly say the same: equal values are one object. Collective."""
        return self._round(value, what, timeout)

    def broadcast(self, value: Any, *, src: int = 0, what: str, timeout: float | None = None) -> Any:
        """The value of group rank `src`. Collective."""
        return self._round(value if self._rank == src else None, what, timeout)[src]

    def barrier(self, *, what: str, timeout: float | None = None) -> None:
        """Return when all ranks have come here. Collective."""
        self._round(None, what, timeout)

    def fail(self, reason: str) -> None:
        """Tell the others, instead of coming to the next round, that this rank cannot go on. Local, does not wait."""
        for other in self._led:
            other.fail(reason)
        if self._error is not None or self.world_size == 1:
            return
        self._error = PeerFailed(f"{self._who} gave up: {reason}")
        base = f"{self._prefix}/{self._seq}"
        outcome = json.dumps({"failed": {str(self._rank): reason}})
        try:
            self._store.append(f"{base}/in", self._line(json.dumps({"failed": reason})))
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
        now = self._clock.now()
        if now < self._ask_at:
            return None
        self._ask_at = now + _LONGEST_PAUSE_PER_RANK_S * self.world_size
        try:
            said = self._store.peek(f"{self._prefix}/failed")
        except PeerError as lost:
            return lost
        if said:
            return self._as_error(json.loads(said), "stops")
        if now < self._look_at:
            return None
        self._look_at = now + _LOOK_EVERY_S
        ended = self._dead(self._neighbours())
        if not ended:
            return None
        if self.world_size > _MANY:  # the others, who look elsewhere, are told
            told = {"missing": [self._ranks.index(r) for r in ended], "ended": list(ended), "patience": self._timeout}
            try:
                self._store.decide(f"{self._prefix}/failed", json.dumps(told))
            except PeerError as error:
                return error
        names = f"{'rank' if len(ended) == 1 else 'ranks'} {', '.join(map(str, ended))}"
        return PeerError(f"{self._who} stops: the process of {names} has ended", ended)

    def _neighbours(self) -> list[int]:
        """Global ranks to look up now: all others of a small group, of a large one some, next time those behind them."""
        others = [*self._ranks[self._rank + 1 :], *self._ranks[: self._rank]]
        if len(self._ranks) <= _MANY:
            return others
        first = self._looks * _MANY % len(others)
        self._looks += 1
        return others[first : first + _MANY]

    def farewell(self, timeout: float) -> None:
        """The last round: the leader leaves last, because its process may host the store. Collective."""
        self.barrier(what="close", timeout=timeout)
        if self.world_size == 1:
            return
        base = f"{self._prefix}/farewell"
        self._store.append(f"{base}/in", self._line("{}"), wait=True)  # this process may end when it is out
        if self._rank == 0:
            self._wait(f"{base}/in", self._complete, self._clock.now() + timeout, base)

    # One round.

    def _round(self, value: Any, what: str, timeout: float | None) -> Gathered:
        self._guard.check(f"{self._who} {what}")
        if self._error is not None:
            raise self._error
        if self.world_size == 1:
            return Gathered([(value, (0,))], 1)
        base = f"{self._prefix}/{self._seq}"
        patience = self._timeout if timeout is None else timeout
        deadline = self._clock.now() + patience
        record = json.dumps({"value": value, "what": what})
        try:
            if len(record) > _LONG_RECORD:
                name = f"{base}/{hashlib.sha256(record.encode()).hexdigest()}"
                self._store.post(name, record)
                record = json.dumps({"at": name})
            self._store.append(f"{base}/in", self._line(record))
            outcome = self._lead(base, patience, deadline) if self._rank == 0 else self._follow(base, patience, deadline)
        except PeerError as lost:
            self._error = PeerError(f"{self._who} {what}: {lost}", [self._ranks[0]] if self._rank else [])
            raise self._error from lost
        except BaseException as error:  # Ctrl-C: the record is out, so this rank no longer knows at which round it is
            self._error = PeerFailed(f"{self._who} {what} was interrupted by {type(error).__name__}: start over")
            raise
        self._seq += 1
        if "values" in outcome:
            return unpack(outcome["values"])
        self._error = self._as_error(outcome, what)
        raise self._error

    def _line(self, record: str) -> str:
        return f"{self._rank} {record}\n"

    def _lines(self, found: bytes) -> list[tuple[int, str]]:
        """Group rank and record of each line that ranks have added, in the order in which they came."""
        return [(int(rank), record) for rank, _, record in (line.partition(" ") for line in found.decode().splitlines())]

    def _complete(self, found: bytes) -> bool:
        """Whether every rank has added its line. One that failed after it had come has added two."""
        return found.count(b"\n") >= self.world_size and len({r for r, _ in self._lines(found)}) == self.world_size

    def _lead(self, base: str, patience: float, deadline: float) -> dict[str, Any]:
        found, stuck = self._wait(f"{base}/in", self._complete, deadline, base)
        if stuck is not None:
            return self._publish(base, stuck | {"patience": patience})
        ranks_of: dict[str, list[int]] = {}
        for r, text in self._lines(found):
            ranks_of.setdefault(text, []).append(r)
        records = {text: json.loads(text) for text in ranks_of}
        used = [f"{base}/in", f"{base}/all", f"{base}/watch"]
        long = {text: record["at"] for text, record in records.items() if "at" in record}
        if long:
            used += long.values()
            records |= zip(long, map(json.loads, self._store.get_all(list(long.values()))), strict=True)
        failed = {str(r): record["failed"] for text, record in records.items() if "failed" in record for r in ranks_of[text]}
        if failed:
            return self._publish(base, {"failed": failed})
        text_of = {r: text for text, ranks in ranks_of.items() for r in ranks}
        index: dict[str, int] = {}
        at = [index.setdefault(text_of[r], len(index)) for r in range(self.world_size)]
        said = [records[text] for text in index]
        if len({record["what"] for record in said}) > 1:
            shown = ", ".join(f"rank {self._ranks[r]} in {said[i]['what']!r}" for r, i in enumerate(at))
            return self._publish(base, {"conflict": f"ranks make different calls: {shown}"})
        outcome = self._publish(base, {"values": pack([record["value"] for record in said], at)})
        # All ranks are past the publication before this one: nobody reads it any more.
        self._store.delete(self._used)
        self._used = used
        return outcome

    def _follow(self, base: str, patience: float, deadline: float) -> dict[str, Any]:
        found, stuck = self._wait(f"{base}/all", bool, deadline, base)
        if stuck is not None:
            return self._publish(base, stuck | {"patience": patience})
        outcome: dict[str, Any] = json.loads(found)
        return outcome

    def _publish(self, base: str, outcome: dict[str, Any]) -> dict[str, Any]:
        """Decide the round, unless somebody was first; returns what was decided."""
        decided: dict[str, Any] = json.loads(self._store.decide(f"{base}/all", json.dumps(outcome)))
        return decided

    def _absent(self, base: str) -> list[int]:
        """Group ranks that have not come to the round at `base`."""
        here = {r for r, _ in self._lines(self._store.peek(f"{base}/in"))}
        return [r for r in range(self.world_size) if r != self._rank and r not in here]

    def _leader(self) -> list[int]:
        """Group rank 0 as one that is waited for: its record may be there, and what it has to publish is not."""
        return [0] if self._rank else []

    def _wait(self, key: str, enough: Callable[[bytes], bool], deadline: float, base: str) -> tuple[bytes, dict[str, Any] | None]:
        """Wait until what is at `key` is `enough`: that, and else the outcome to publish for the round at `base`."""
        began = self._clock.now()
        look_at = began + _LOOK_EVERY_S
        watch = Watch(self._store, f"{base}/watch", self._rank, self._ranks)
        n = self.world_size
        shortest = max(_FIRST_PAUSE_S, _FIRST_PAUSE_PER_RANK_S * n)
        longest = max(_LONGEST_PAUSE_S, _LONGEST_PAUSE_PER_RANK_S * n)
        if n > _MANY:
            known = min(self._store.pace.get(n, 0.0) / 2, _KNOWN_PAUSE_PER_RANK_S * n)
            self._clock.sleep(min(max(known, shortest), deadline - began))
        while not enough(found := self._store.peek(key)):
            now = self._clock.now()
            if now >= deadline:
                return b"", {"missing": self._absent(base) or self._leader()}
            if now >= look_at:
                look_at = now + _LOOK_EVERY_S
                hopeless = self._look(base, watch)
                if hopeless is not None:
                    return b"", hopeless
            grown = (now - began) / (2 if n > _MANY else 3)
            self._clock.sleep(min(max(grown, shortest), longest, deadline - now))
        self._store.pace[n] = self._clock.now() - began
        return found, None

    def _look(self, base: str, watch: Watch) -> dict[str, Any] | None:
        """Why waiting any longer is of no use, as the outcome of the round; None if it may still be."""
        if self._store.peek(f"{base}/all"):  # another rank has decided the round
            return {}
        suspects = watch.asked() if not watch.my_turn() else None
        if suspects is None:
            suspects = self._absent(base)
            awaited = sorted({*suspects, *self._leader()})
            notes = {r: self._activity.read(self._ranks[r]) for r in awaited}
            ended = set(self._dead([self._ranks[r] for r in awaited]))
            gone = [r for r in awaited if self._ranks[r] in ended or (notes[r] or {}).get("gone")]
            if gone:
                return {"missing": gone, "ended": [self._ranks[r] for r in gone]}
            watch.ask(suspects, notes)
        if self._conflict is None or not suspects:
            return None
        reason = self._conflict([self._ranks[r] for r in suspects])
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
