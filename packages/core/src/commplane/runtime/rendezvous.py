"""Find the store that all ranks share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from commplane.agree import REAL, Clock
from commplane.errors import ConfigError

__all__ = ["World", "find_world"]


@dataclass(frozen=True)
class World:
    """A store and this process's place. `origin` says where they came from, `clock` by what the control plane waits."""

    store: Any
    rank: int
    world_size: int
    origin: str
    clock: Clock = REAL


def find_world(store: Any, rank: int | None, world_size: int | None, timeout: float) -> World:
    """A given store, else an initialised default group, else torchrun's environment. Collective through the store.

    Raises:
        ConfigError: none of the three is there, or only part of one.
    """
    given = (store, rank, world_size)
    if any(g is not None for g in given):
        if store is None or rank is None or world_size is None:
            raise ConfigError("init wants store, rank and world_size together, found only some of them")
        if not 0 <= rank < world_size:
            raise ConfigError(f"init wants 0 <= rank < world_size, found rank {rank} and world_size {world_size}")
        return World(store, rank, world_size, "given store")
    import torch.distributed as dist

    if not dist.is_available():
        raise ConfigError("this build of torch has no torch.distributed: install another, or pass store, rank, world_size")
    if dist.is_initialized():
        default: Any = dist.distributed_c10d._get_default_store()
        return World(dist.PrefixStore("commplane", default), dist.get_rank(), dist.get_world_size(), "default group")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        try:
            found: Any = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"no rendezvous through the environment of torchrun: {error}") from error
        return World(dist.PrefixStore("commplane", found[0]), found[1], found[2], "torchrun environment")
    raise ConfigError(
        "no rendezvous: wanted torchrun's environment (RANK and WORLD_SIZE), an initialised default group or "
        "init(store=, rank=, world_size=), found none; start with 'commplane run --ranks 2 script.py' or torchrun"
    )
