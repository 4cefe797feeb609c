"""torch's own backends, for what a communicator has not: Gloo for tensors on CPU, NCCL for those on CUDA."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["gloo", "nccl"]


def gloo(store: Any, ranks: Sequence[int], rank: int, name: str, timeout: timedelta, connects: float) -> Any:
    """Gloo over the group. Collective: it connects, within `connects` seconds where torch lets that be said."""
    store = dist.PrefixStore("gloo", store)
    if not hasattr(dist.ProcessGroupGloo, "set_timeout"):
        group = dist.ProcessGroupGloo(store, rank, len(ranks), timeout=timeout)
    else:
        group = dist.ProcessGroupGloo(store, rank, len(ranks), timeout=timedelta(seconds=connects))
        group.set_timeout(timeout)
    _name(getattr(group, "options", None), ranks, name)
    group._set_sequence_number_for_group()
    return group


def nccl(store: Any, ranks: Sequence[int], rank: int, name: str, timeout: timedelta, given: Any) -> Any | None:
    """NCCL over the group, or None where torch has none or sees no GPU. Local: it connects in its first collective."""
    if not (dist.is_nccl_available() and torch.cuda.is_available()):
        return None
    options = given if isinstance(given, dist.ProcessGroupNCCL.Options) else dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    _name(options, ranks, name)
    group = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, len(ranks), options)
    group._set_sequence_number_for_group()
    return group


def _name(options: Any, ranks: Sequence[int], name: str) -> None:
    """What torch tells its own backends, for their logs and flight records; older ones have not all of it."""
    for key, value in (("global_ranks_in_group", list(ranks)), ("group_name", name)):
        if hasattr(options, key):
            setattr(options, key, value)
