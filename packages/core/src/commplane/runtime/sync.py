"""Decisions that all ranks take alike: one exchange of fixed schema a step.

A decision that depends on a local clock, pool size or queue length is a vote with a stated rule. Every rank runs the same
round in every step, whatever it has to say; a collective whose execution depends on local state is what hangs engines. The
schema is what plugins registered with `commplane_register_cache_sync`; it is compared once, and its hash and the number of the
step travel with every round, so that a rank that is a step behind is an error and not a wrong answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from commplane.api import SyncSpec, Vote
from commplane.errors import MismatchError, UnsupportedOperation
from commplane.runtime.communicator import Communicator

__all__ = ["SyncRound"]

_RULES: dict[Vote, Callable[[Sequence[int]], int]] = {
    Vote.ANY: lambda column: int(any(column)),
    Vote.ALL: lambda column: int(all(column)),
    Vote.MIN: min,
    Vote.MAX: max,
    Vote.LEADER: lambda column: column[0],
}


class SyncRound:
    """Votes over one group. Made by `Plane.sync_round`, over a communicator of its own that nothing else uses.

    Attributes:
        fields: ``"spec.field"`` -> rule, in the order in which they travel; equal on every rank.
        steps: rounds completed.
    """

    def __init__(self, communicator: Communicator, specs: Mapping[str, SyncSpec]) -> None:
        self._communicator = communicator
        self.fields = {f"{name}.{f.name}": f.rule for name, spec in sorted(specs.items()) for f in spec.fields}
        self.steps = 0
        schema = {name: str(rule) for name, rule in self.fields.items()}
        communicator.compare("sync round", schema)
        digest = hashlib.sha256(json.dumps(schema, sort_keys=True).encode()).digest()
        self._schema_hash = int.from_bytes(digest[:7], "big")

    def step(self, values: Mapping[str, int]) -> dict[str, int]:
        """One round: this rank's value of every field in, the agreed value of every field out. Collective.

        Args:
            values: an integer of at most 63 bits for each of `fields`; 0 and 1 for ``any`` and ``all``.

        Raises:
            UnsupportedOperation: a field is missing or unknown; nothing was sent.
            MismatchError: a rank is at another step.
            PeerError: a rank is missing at the deadline.
        """
        import torch

        if values.keys() != self.fields.keys():
            missing, unknown = self.fields.keys() - values.keys(), values.keys() - self.fields.keys()
            raise UnsupportedOperation(
                f"{self._communicator.who} sync round wants a value for each of {', '.join(self.fields) or 'no field'}; "
                f"missing: {', '.join(sorted(missing)) or 'none'}, unknown: {', '.join(sorted(unknown)) or 'none'}"
            )
        self.steps += 1
        mine = torch.tensor([[self._schema_hash, self.steps, *(int(values[name]) for name in self.fields)]], dtype=torch.int64)
        rows = self._communicator.all_gather(mine).tolist()
        heads = {rank: tuple(row[:2]) for rank, row in zip(self._communicator.ranks, rows, strict=True)}
        if len(set(heads.values())) > 1:
            steps = ", ".join(f"rank {rank} at step {head[1]}" for rank, head in heads.items())
            error = MismatchError(f"{self._communicator.who} sync round: ranks are at different steps: {steps}")
            self._communicator.poison(error)
            raise error
        columns = zip(*(row[2:] for row in rows), strict=True)
        return {name: int(_RULES[rule](column)) for (name, rule), column in zip(self.fields.items(), columns, strict=True)}

    def close(self) -> None:
        """Close the communicator. Collective, idempotent."""
        self._communicator.close()
