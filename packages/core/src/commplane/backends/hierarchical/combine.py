"""The results of the hosts as one, in the order of hosts: elementwise and exact in IEEE arithmetic, so equal bits everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from commplane.api import ReduceOp

__all__ = ["combine"]


def combine(parts: Tensor, op: ReduceOp, out: Tensor) -> None:
    """Fill `out` from ``parts[host]``. Local.

    Sums of 16-bit types over more than two hosts are kept in float32 and rounded once. A NaN stays one, in every op.

    Args:
        parts: a row for each host, two or more.
        op: sum, min or max.
        out: as long as a row.
    """
    if op is not ReduceOp.SUM:
        choose = torch.minimum if op is ReduceOp.MIN else torch.maximum
        choose(parts[0], parts[1], out=out)
        for row in parts[2:]:
            choose(out, row, out=out)
    elif len(parts) > 2 and out.dtype.is_floating_point and out.dtype.itemsize == 2:
        total = parts[0].float()
        for row in parts[1:]:
            total += row
        out.copy_(total)
    else:
        torch.add(parts[0], parts[1], out=out)
        for row in parts[2:]:
            out += row
