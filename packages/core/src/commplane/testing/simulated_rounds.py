"""Sync rounds of many ranks without communication: one thread is all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from commplane.api import Agreed, SyncSpec
from commplane.errors import CommplaneError, CommunicatorError, MismatchError, PeerError, UnsupportedOperation
from commplane.flight import RoundNotes
from commplane.runtime.sync.board import Board
from commplane.runtime.sync.schema import Schema

__all__ = ["SimulatedRounds"]


class SimulatedRounds(Sequence["SimulatedRound"]):
    """The sync rounds of `world_size` ranks in one thread, for simulations: element ``i`` is that of group rank ``i``.

    A rank's `issue` writes its row; the first `result` after all ranks have issued decides for all of them. The packing, the
    checks and the rules are those of a real round. Instead of waiting, `result` raises the `PeerError` that names the ranks
    which have not issued, and then every rank has it. Ranks may be played in any order, also those that read a round
    and issue the next one before others have read.

    Args:
        world_size: number of ranks.
        specs: of the fields.
        ranks: global ranks; if unset, 0, 1, ...
    """

    def __init__(self, world_size: int, specs: Iterable[SyncSpec], ranks: Sequence[int] | None = None) -> None:
        import numpy as np

        self.ranks = tuple(range(world_size) if ranks is None else ranks)
        self.schema = schema = Schema(specs, world_size)
        self.fault: CommplaneError | None = None
        self._board = Board(schema, self.ranks)
        # Two, because a rank may issue a round while others have not read the one before.
        self._rows = [np.zeros((world_size, schema.columns), dtype=np.int64) for _ in range(2)]
        self.buffers: list[Any] = [rows.data for rows in self._rows]
        self.issued = [0, 0]
        self._decided: list[dict[str, Any]] = [{}, {}]
        self._rounds = [SimulatedRound(self, i) for i in range(world_size)]

    @overload
    def __getitem__(self, index: int) -> SimulatedRound: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SimulatedRound]: ...

    def __getitem__(self, index: int | slice) -> SimulatedRound | Sequence[SimulatedRound]:
        return self._rounds[index]

    def __len__(self) -> int:
        return len(self._rounds)

    def decide(self, step: int) -> dict[str, Any]:
        """What round `step` comes to, worked out once. Called by the rounds."""
        odd = step & 1
        if self.issued[odd] < len(self._rounds):
            missing = [self.ranks[r.rank] for r in self._rounds if r.asked < step]
            names = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}"
            self.fault = PeerError(f"sync round: step {step} is read and {names} did not issue it", missing)
            raise self.fault
        if self.issued[odd] == len(self._rounds):
            outcome = self._board.agreed(self._rows[odd])
            if isinstance(outcome, str):
                self.fault = MismatchError(f"sync round: {outcome}")
                raise self.fault
            self._decided[odd] = self.schema.named(outcome)
            self.issued[odd] += 1  # decided
            self.issued[not odd] = 0
        return self._decided[odd]


class SimulatedRound:
    """One rank's end of `SimulatedRounds`; a `commplane.api.SyncRound`.

    Attributes:
        rank: group rank.
        world_size: number of ranks.
        ranks: global ranks in group order.
        steps: rounds completed.
        asked: rounds issued.
        notes: what was noted last.
    """

    __slots__ = ("_closed", "_offset", "_pack", "_rounds", "asked", "notes", "rank", "ranks", "steps", "world_size")

    def __init__(self, rounds: SimulatedRounds, rank: int) -> None:
        self._rounds = rounds
        self._pack = rounds.schema.pack_into
        self._offset = rank * rounds.schema.row_bytes
        self._closed = False
        self.rank = rank
        self.ranks = rounds.ranks
        self.world_size = len(rounds.ranks)
        self.steps = self.asked = 0
        self.notes = RoundNotes("simulated", rounds.ranks, rank)

    def step(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> Agreed:
        """`issue` and `result`: of use where this is the last rank to be played, or the only one."""
        self.issue(values, digest=digest)
        return self.result()

    def issue(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> None:
        """Write this rank's row."""
        rounds, step = self._rounds, self.asked + 1
        if step != self.steps + 1:
            raise UnsupportedOperation(f"sync round: step {self.asked} is out already: read its result before the next issue")
        self._check()
        odd = step & 1
        self._pack(rounds.buffers[odd], self._offset, step, values, digest)
        rounds.issued[odd] += 1
        self.asked = step

    def result(self) -> Agreed:
        """What all ranks agreed on; `PeerError` where some have not issued."""
        step = self.steps + 1
        if self.asked != step:
            raise UnsupportedOperation("sync round: no round is out: issue one before its result is read")
        self._check()
        agreed = self._rounds.decide(step).copy()
        self.steps = self.notes.step = step
        return agreed

    def note(self, what: str, *numbers: int) -> None:
        """Remember a decision; nothing dumps it, `notes` holds it."""
        self.notes.add(what, numbers)

    def _check(self) -> None:
        if self._closed:
            raise CommunicatorError("sync round is closed")
        if self._rounds.fault is not None:
            fault = self._rounds.fault
            raise type(fault)(str(fault), fault.missing_ranks) if isinstance(fault, PeerError) else type(fault)(str(fault))

    def close(self) -> None:
        """Every later call raises."""
        self._closed = True
