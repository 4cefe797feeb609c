"""The parts of one rank: its groups, its model, its cache and its store."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import commplane
from commplane.api import PageStore, PageStoreSpec, StoreContext
from commplane.demo import ModelConfig, PagedKV, Shard, Transformer
from commplane_cache.cache import PrefixCache
from commplane_cache.demo.faults import FaultyStore, Journal
from commplane_cache.demo.job import Job
from commplane_cache.keys import KeyScheme
from commplane_cache.options import CacheOptions
from commplane_cache.tiers import FlatCopier, HostTier

__all__ = ["Parts", "build", "opened_cache"]


@dataclass(frozen=True)
class Parts:
    """What lives as long as the process.

    Attributes:
        grid: global ranks of attention-TP x attention-CP: those that must hold the same tree.
        page_tokens: tokens in a page of the cache: a page of this rank's pool holds those of its context-parallel part.
    """

    plane: commplane.Plane
    config: ModelConfig
    shard: Shard
    model: Transformer
    grid: Sequence[int]
    page_tokens: int


def build(job: Job, plane: commplane.Plane) -> Parts:
    """Groups and model. Collective over all ranks."""
    config = ModelConfig(**job.model)
    tp_rank, cp_rank = job.rank % job.tp, job.rank // job.tp
    tp_ranks = [cp_rank * job.tp + i for i in range(job.tp)]
    cp_ranks = [i * job.tp + tp_rank for i in range(job.cp)]
    shard = Shard(tp_rank, job.tp, cp_rank, job.cp)
    groups = [
        plane.communicator(f"attention_{name}", ranks, device="cpu") if len(ranks) > 1 else None
        for name, ranks in (("tp", tp_ranks), ("cp", cp_ranks))
    ]
    sums = [None if group is None else _summing(group) for group in groups]
    model = Transformer(config, shard, tp_sum=sums[0], cp_sum=sums[1])
    for group, largest in zip(groups, model.message_bytes(), strict=True):
        if group is not None:
            group.prepare("all_reduce", dtype=torch.float64, max_bytes=largest)
    return Parts(plane, config, shard, model, range(job.tp * job.cp), config.page_tokens * job.cp)


def _summing(group: commplane.Communicator) -> Callable[[torch.Tensor], object]:
    return lambda tensor: group.all_reduce_(tensor)


@contextmanager
def opened_cache(job: Job, parts: Parts, pool: PagedKV) -> Iterator[PrefixCache]:
    """A cache over the model's pool, a host tier, and the store that the job names. Collective over the grid.

    Left without an exception, it is proved that every page has one owner.
    """
    size, setup = pool.layout.page_bytes, job.cache
    host_memory = torch.zeros(max(1, setup.host // parts.page_tokens) * size, dtype=torch.uint8)
    host = HostTier(host_memory, size)
    options = CacheOptions(
        page_tokens=parts.page_tokens,
        write=setup.write,
        prefetch=setup.policy,
        pipelined=setup.pipelined,
        # Short conversations: a few pages are read at a time, so that a prefetch can end before it is complete.
        prefetch_batch_pages=8,
        timeout_base=setup.patience,
    )
    rounds = parts.plane.sync_round("cache", parts.grid, specs=["cache"], timeout=setup.timeout)
    store = _opened_store(job, parts, size) if setup.store else None
    copier = FlatCopier(pool.bytes, host_memory, size)
    cache = PrefixCache(rounds, pool.capacity, host, store, copier=copier, options=options)
    try:
        yield cache
        cache.check()
        cache.close()
    finally:
        if store is not None:
            store.close()  # ends what still reads from or writes to the host memory
    rounds.close()


def _opened_store(job: Job, parts: Parts, page_bytes: int) -> PageStore:
    """The page store of that name among all plugins, opened for this rank's part of the pages. Local.

    Raises:
        PluginNotFound: no plugin registers it.
    """
    known = parts.plane.plugins.registered(PageStoreSpec)
    if job.cache.store not in known:
        raise parts.plane.plugins.not_found("page store", job.cache.store, known)
    spec = known[job.cache.store].spec
    assert isinstance(spec, PageStoreSpec)
    module, _, attribute = spec.factory.partition(":")
    store: PageStore = getattr(importlib.import_module(module), attribute)()
    if job.journal:
        store = Journal(store, Path(job.journal))
    if job.fault:
        store = FaultyStore(store, job.fault)
    options = {name: _placed(value, job.rank) for name, value in job.cache.options.items()}
    store.open(StoreContext(page_bytes, _keys(job, parts).namespace, job.cache.timeout, options))
    return store


def _keys(job: Job, parts: Parts) -> KeyScheme:
    """What the bytes of this rank's pages are."""
    shard, heads = parts.shard, parts.config.kv_heads
    part = heads // shard.tp_size
    return KeyScheme(
        model="commplane.demo",
        revision=f"{job.revision} {parts.config}",
        dtype="float32",
        page_tokens=parts.page_tokens,
        layout="layer,kv head,kv,token,dim",
        shard=f"kv heads {shard.tp_rank * part}+{part} of {heads}, page {shard.cp_rank} of every {shard.cp_size}",
    )


def _placed(value: Any, rank: int) -> Any:
    return value.replace("{rank}", str(rank)) if isinstance(value, str) else value
