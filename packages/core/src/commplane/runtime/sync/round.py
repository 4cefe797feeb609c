"""A round of votes over one group: pack, exchange, check, reduce."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from commplane.api import Agreed
from commplane.errors import AgreementError, CommplaneError, CommunicatorError, MismatchError, PeerError, UnsupportedOperation
from commplane.flight import RoundNotes
from commplane.notice import notice
from commplane.runtime.sync.board import Board
from commplane.runtime.sync.paths import Path, Threadless
from commplane.runtime.sync.roll_call import BEFORE_ROLL_CALL, RollCall
from commplane.runtime.sync.schema import Schema
from commplane.runtime.sync.worker import Worker

__all__ = ["SyncRound"]

# How often one that waits for the thread looks whether another rank has given up.
_LOOK_EVERY_S = 0.02


class SyncRound:
    """Votes over one group. Made by `Plane.sync_round`, over communicators of its own that nothing else uses.

    Inside a host `issue` leaves the row in shared memory, and `result` waits for those of the others; `step` runs on the thread
    that calls it. Elsewhere the round is given to a thread of its own, which waits for the peers in native code without the GIL
    and may be left there at the deadline. In a group of one nothing is sent. Calls come from one thread at a time. After a
    `PeerError` or a `MismatchError` every later call raises at once. A capture passes a round by.

    Attributes:
        rank: group rank.
        world_size: number of ranks.
        ranks: global ranks in group order.
        fields: ``"spec.field"`` -> field; equal on every rank.
        steps: rounds completed.
        timeout: seconds that one round may take.
        notes: what was noted last, for the flight recorder.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        ranks: Sequence[int],
        schema: Schema,
        path: Path,
        roll_call: RollCall,
        timeout: float,
        on_close: Callable[[SyncRound], None],
    ) -> None:
        self.name = name
        self.rank = rank
        self.ranks = tuple(ranks)
        self.world_size = len(self.ranks)
        self.fields = schema.fields
        self.steps = 0
        self.timeout = timeout
        self.notes = RoundNotes(name, self.ranks, rank)
        self._schema, self._path, self._roll_call, self._on_close = schema, path, roll_call, on_close
        self._threadless = path if isinstance(path, Threadless) else None
        self._board = Board(schema, self.ranks)
        self._pack, self._exchange, self._buffer = schema.pack_into, path.exchange, path.buffer
        self._worker: Worker[Any] | None = None
        self._out = False
        self._began = 0.0
        self._fault: CommplaneError | None = None
        self._closed = False

    @property
    def who(self) -> str:
        """How errors begin."""
        return f"[sync_{self.name} rank {self.rank}/{self.world_size}]"

    @property
    def communicators(self) -> tuple[Any, ...]:
        """The open communicators of this rank that the round runs on."""
        return tuple(self._path.communicators)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "poisoned" if self._fault else f"{self.steps} steps"
        return f"<SyncRound {self.name!r} over {list(self.ranks)}, rank {self.rank}: {state}>"

    def step(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> Agreed:
        """One round: this rank's value of every field in, the agreed value of every field out. Collective, blocking.

        Args:
            values: for each field an integer of at most 63 bits, or as many as the field counts; 0 and 1 for ``any`` and
                ``all``. The sum over the ranks has to fit, too.
            digest: of this rank's state before the step, at most 63 bits; must be equal on all ranks.

        Raises:
            UnsupportedOperation: a field is missing, unknown or of another count; nothing was sent.
            MismatchError: ranks are at different steps, have different schemas, or their digests differ.
            PeerError: a rank is missing at the deadline; it is named.
        """
        self._write(values, digest)
        try:
            if self._path.names_who_is_missing:  # and ends by itself
                self._out = False
                return self._decide(self._exchange())
            self._start()
            rows = self._collect()
            self._out = False
            return self._decide(rows)
        except BaseException as error:
            self._out = False
            self.notes.fail()  # before the communicators are poisoned, which dumps
            raise self._failed(error) from error.__cause__

    def issue(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> None:
        """Send this rank's values of the next round and return. Local.

        Raises:
            UnsupportedOperation: as in `step`, or a round is out already.
        """
        self._write(values, digest)
        if self._threadless is None:
            if self.world_size > 1:
                self._start()
            return
        try:
            self._threadless.send()
        except BaseException as error:  # Ctrl-C: whether it was sent is not known
            self._out = False
            raise self._failed(error) from error.__cause__

    def result(self) -> Agreed:
        """Wait for the round that `issue` sent; every rank must have issued it. Collective. Raises what `step` raises."""
        if not self._out:
            self._check()
            raise UnsupportedOperation(f"{self.who} sync round: none is out: issue one before its result is read")
        try:
            rows = self._collect()
            self._out = False
            return self._decide(rows)
        except KeyboardInterrupt:  # of this thread while it waits: the round is as it was
            raise
        except BaseException as error:
            self._out = False
            self.notes.fail()
            raise self._failed(error) from error.__cause__

    def note(self, what: str, *numbers: int) -> None:
        """Remember a decision that followed from what was agreed, for the flight records. Local; costs well below 1 us.

        Args:
            what: the kind of decision.
            numbers: of what. Formatted when records are dumped, not before.
        """
        self.notes.add(what, numbers)

    def _write(self, values: Mapping[str, int | Sequence[int]], digest: int) -> None:
        """Pack what travels. Local."""
        if self._out or self._closed or self._fault is not None:
            self._check()
            raise UnsupportedOperation(
                f"{self.who} sync round: step {self.steps + 1} is out already: read its result before the next is issued"
            )
        try:
            self._pack(self._buffer, 0, self.steps + 1, values, digest)
        except UnsupportedOperation as error:
            raise UnsupportedOperation(f"{self.who} {error}") from None
        self._out, self._began = True, time.monotonic()

    def _start(self) -> None:
        """Let the thread begin with the exchange."""
        if self._worker is None:
            self._worker = Worker(self._exchange, f"commplane sync {self.name}")
            if not self._path.names_who_is_missing:
                self._roll_call.attend(lambda: self._began if self._out else None)
        self._worker.start()

    def _collect(self) -> Any:
        """The rows of the round that is out."""
        if self._threadless is not None:
            return self._threadless.collect()
        if self._worker is None:
            return self._exchange()
        if self._path.names_who_is_missing:
            ended = self._worker.wait(max(self._began + self.timeout - time.monotonic(), 0.0))
        else:
            deadline = self._began + BEFORE_ROLL_CALL * self.timeout
            while not (ended := self._worker.wait(min(max(deadline - time.monotonic(), 0.0), _LOOK_EVERY_S))):
                if self._roll_call.reason is not None:
                    raise PeerError(f"another rank gave up first: {self._roll_call.reason}")
                if time.monotonic() >= deadline:
                    break
        if not ended:
            raise PeerError(f"no answer within {time.monotonic() - self._began:.3g} s")
        return self._worker.outcome()

    def _decide(self, rows: Any) -> dict[str, Any]:
        outcome = self._board.agreed(rows)
        if isinstance(outcome, str):
            raise MismatchError(f"{self.who} sync round: {outcome}")
        self.steps += 1
        self.notes.step = self.steps
        return self._schema.named(outcome)

    def _check(self) -> None:
        if self._closed:
            raise CommunicatorError(f"{self.who} sync round is closed: create it again to go on")
        if self._fault is not None:
            text = f"{self.who} sync round is poisoned by an earlier fault and must be closed: {self._fault}"
            if isinstance(self._fault, PeerError):
                raise PeerError(text, self._fault.missing_ranks)
            raise type(self._fault)(text)

    def _failed(self, error: BaseException) -> BaseException:
        """What to raise for `error` of an exchange. Nothing more can be exchanged, and the peers are let go."""
        if not isinstance(error, Exception):
            self._fault = AgreementError(f"{self.who} sync round, step {self.steps + 1}, was interrupted")
            self._poison(self._fault)
            return error
        asked = not self._path.names_who_is_missing
        if asked:
            # First of all, because to poison may take a while. A result that is read late leaves the others time all the same.
            now = time.monotonic()
            self._roll_call.call(max(self._began + self.timeout, now + (1 - BEFORE_ROLL_CALL) * self.timeout))
        self._poison(error)
        if isinstance(error, PeerError):
            error = self._named(error, self._roll_call.missing() if asked else error.missing_ranks)
        self._fault = error if isinstance(error, CommplaneError) else CommunicatorError(f"{type(error).__name__}: {error}")
        return error

    def _named(self, error: PeerError, missing: Sequence[int] | None) -> PeerError:
        """`error` with the ranks that are missing from the round; None where that is not known."""
        what = f"{self.who} sync round, step {self.steps + 1}"
        if missing:
            names = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}"
            return PeerError(f"{what}: {names} did not take part: {error}", missing)
        if missing is None or self._path.names_who_is_missing:
            return PeerError(f"{what}: {error}", error.missing_ranks)
        return PeerError(f"{what}: all ranks are alive, and the connection between some is lost or slow: {error}")

    def _poison(self, error: Exception) -> None:
        if self._threadless is not None:
            self._threadless.leave()
        for c in self._path.communicators:
            c.poison(error)

    def disown(self) -> None:
        """In a forked child: every call raises. Local."""
        self._out, self._worker = False, None
        if self._threadless is not None:
            self._threadless.forget()
        self._fault = CommunicatorError("the round belongs to the parent process: a forked child must create its own")

    def close(self) -> None:
        """Leave the group, after the round that is out, if one is. Collective, idempotent.

        A rank that does not come is not waited for beyond the deadlines of the round and of the start-up.
        """
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        if self._closed:
            return
        if not wait:
            for c in self._path.communicators:
                c.abort()
        if self._worker is not None:
            patience = max(self._began + self.timeout - time.monotonic(), 0.0) if wait else 1.0
            if self._out and self._worker.wait(patience):
                try:
                    self._worker.outcome()
                except Exception as error:  # nobody is going to read this round
                    self._poison(error)
            # After a fault the thread may still be in a call of the transport, which ends at the deadline of that.
            ended = self._worker.stop(self.timeout if wait and self._fault is not None else 1.0)
            if not ended and wait and self._fault is None:
                notice(f"{self.who} sync round: closed while a round is out, which some rank never came to", stacklevel=4)
        self.notes.closed = True
        self._roll_call.stop()
        self._closed, self._out = True, False
        if self._threadless is not None:
            self._threadless.close()
        for c in reversed(self._path.communicators):
            c._close(wait=wait)
        self._on_close(self)

    def __enter__(self) -> SyncRound:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close(wait=kind is None)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
            if self._worker is not None:
                self._worker.stop(0.0)
            self._roll_call.stop()
