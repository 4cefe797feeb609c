"""The results of the hosts as one, in the order of hosts: elementwise and exact in IEEE arithmetic, so equal bits everywhere."""

from __future__ import annotations

from torch import Tensor, float32, maximum, minimum

from commplane.api import ReduceOp

__all__ = ["combine"]


def combine(parts: Tensor, op: ReduceOp, ranks: int) -> Tensor:
    """One row from ``parts[host]``; `parts` may be overwritten. Local.

    Sums of 16-bit types over more than two hosts are kept in float32 and rounded once. A NaN stays one, in every op.

    Args:
        parts: contiguous, a row for each host.
        op: of the all-reduce.
        ranks: what the sum is divided by for a mean.
    """
    if op in (ReduceOp.MIN, ReduceOp.MAX):
        choose = minimum if op is ReduceOp.MIN else maximum
        for row in parts[1:]:
            choose(parts[0], row, out=parts[0])
        return parts[0]
    wide = parts.dtype.is_floating_point and parts.dtype.itemsize == 2 and len(parts) > 2
    total = parts[0].to(float32) if wide else parts[0]
    for row in parts[1:]:
        total += row
    total = total.to(parts.dtype)
    return total.div_(ranks) if op is ReduceOp.AVG else total
