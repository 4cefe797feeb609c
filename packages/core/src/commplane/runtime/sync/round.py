"""A round of votes over one group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from commplane.api import Agreed, SyncSpec
from commplane.errors import MismatchError, UnsupportedOperation
from commplane.runtime.communicator import Communicator
from commplane.runtime.sync.board import Board
from commplane.runtime.sync.schema import Schema

__all__ = ["SyncRound"]


class SyncRound:
    """Votes over one group. Made by `Plane.sync_round`, over a communicator of its own that nothing else uses.

    Attributes:
        rank: group rank.
        world_size: number of ranks.
        ranks: global ranks in group order.
        fields: ``"spec.field"`` -> field; equal on every rank.
        steps: rounds completed.
    """

    def __init__(self, communicator: Communicator, specs: Iterable[SyncSpec]) -> None:
        import numpy as np
        import torch

        self._communicator = communicator
        self.rank, self.world_size, self.ranks = communicator.rank, communicator.world_size, communicator.ranks
        self._schema = Schema(specs, self.world_size)
        self.fields = self._schema.fields
        self.steps = 0
        communicator.compare("sync round", self._schema.to_json())
        self._board = Board(self._schema, self.ranks)
        row = np.zeros((1, self._schema.columns), dtype=np.int64)
        self._buffer, self._row = row.data, torch.from_numpy(row)
        self._out = False

    def step(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> Agreed:
        """One round: this rank's value of every field in, the agreed value of every field out. Collective, blocking."""
        self.issue(values, digest=digest)
        return self.result()

    def issue(self, values: Mapping[str, int | Sequence[int]], *, digest: int = 0) -> None:
        """Send this rank's values of the next round and return. Local."""
        if self._out:
            raise UnsupportedOperation(f"sync round: step {self.steps + 1} is out already: read its result before the next issue")
        self._schema.pack_into(self._buffer, 0, self.steps + 1, values, digest)
        self._out = True

    def result(self) -> Agreed:
        """Wait for the round that `issue` sent; every rank must have issued it. Collective."""
        if not self._out:
            raise UnsupportedOperation("sync round: no round is out: issue one before its result is read")
        self._out = False
        outcome = self._board.agreed(self._communicator.all_gather(self._row).numpy())
        if isinstance(outcome, str):
            error = MismatchError(f"{self._communicator.who} sync round: {outcome}")
            self._communicator.poison(error)
            raise error
        self.steps += 1
        return self._schema.named(outcome)

    def close(self) -> None:
        """Close the communicator. Collective, idempotent."""
        self._communicator.close()
