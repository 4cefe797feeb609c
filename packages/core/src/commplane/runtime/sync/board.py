"""The rows of all ranks, and what they come to: one vectorised pass for each kind of rule, whatever the number of fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from commplane.api import Vote
from commplane.runtime.sync.schema import HEADER, Schema

__all__ = ["Board", "difference_of_heads"]

_MIN, _MAX, _LEADER, _SUM = range(4)
# Flags are 0 or 1 in a row.
_KIND = {Vote.ANY: _MAX, Vote.ALL: _MIN, Vote.MIN: _MIN, Vote.MAX: _MAX, Vote.LEADER: _LEADER, Vote.SUM: _SUM}


class Board:
    """Reduces the rows of a round. Local.

    numpy and not torch: on rows of some dozens of numbers its reductions cost a third.

    Args:
        schema: what the columns are.
        ranks: global ranks, one a row.
    """

    def __init__(self, schema: Schema, ranks: Sequence[int]) -> None:
        import numpy as np

        self._ranks = tuple(ranks)
        columns = schema.columns
        self._results = np.zeros((4, columns), dtype=np.int64)
        self._minimum, self._maximum, self._add = np.minimum.reduce, np.maximum.reduce, np.add.reduce
        self._low, self._high = self._results[_MIN], self._results[_MAX]
        self._leader = self._results[_LEADER] if Vote.LEADER in schema.rules else None
        self._sum = self._results[_SUM] if Vote.SUM in schema.rules else None
        heads = [kind * columns + c for kind in (_MIN, _MAX) for c in range(HEADER)]
        fields = [_KIND[rule] * columns + HEADER + c for c, rule in enumerate(schema.rules)]
        self._where = np.array([*heads, *fields])

    def agreed(self, rows: Any) -> list[int] | str:
        """The agreed number of each column after the header; or, where headers differ, how.

        Args:
            rows: an int64 array, one row a rank in group order.
        """
        self._minimum(rows, 0, None, self._low)
        self._maximum(rows, 0, None, self._high)
        if self._leader is not None:
            self._leader[:] = rows[0]
        if self._sum is not None:
            self._add(rows, 0, None, self._sum)
        picked: list[int] = self._results.take(self._where).tolist()
        if picked[:HEADER] != picked[HEADER : 2 * HEADER]:
            return difference_of_heads(self._ranks, rows[:, :HEADER].tolist())
        return picked[2 * HEADER :]


def difference_of_heads(ranks: Sequence[int], heads: Sequence[Sequence[int]]) -> str:
    """Who differs in what, as text: schemas before steps before digests, because each makes those after it meaningless."""
    schemas, steps, digests = zip(*heads, strict=True)
    if len(set(schemas)) > 1:
        return f"ranks have different fields: {_against_the_most(ranks, schemas, 'schema')}: register the same specs on all"
    if len(set(steps)) > 1:
        at = ", ".join(f"rank {rank} at step {step}" for rank, step in zip(ranks, steps, strict=True))
        return f"ranks are at different steps: {at}: every rank has to run every round"
    return f"the state of the ranks differs before step {steps[0]}: {_against_the_most(ranks, digests, 'digest')}"


def _against_the_most(ranks: Sequence[int], values: Sequence[int], what: str) -> str:
    """Those whose value is not the one of most ranks; of several with as many, the one of the first rank."""
    usual = max(values, key=values.count)
    same = [rank for rank, value in zip(ranks, values, strict=True) if value == usual]
    others = [f"rank {rank} has {value:#x}" for rank, value in zip(ranks, values, strict=True) if value != usual]
    return f"{what} {usual:#x} on {_ranks(same)}, {', '.join(others)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
