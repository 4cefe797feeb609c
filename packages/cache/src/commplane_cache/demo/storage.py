"""A rank's cache and its store, opened for one pass."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import commplane
from commplane.api import PageStore, PageStoreSpec, StoreContext
from commplane.demo import ModelConfig, PagedKV
from commplane_cache.cache import PrefixCache
from commplane_cache.demo.faults import FaultyStore, Journal
from commplane_cache.demo.job import CacheJob, Job
from commplane_cache.demo.parts import Parts, shard_of
from commplane_cache.keys import KeyScheme
from commplane_cache.options import CacheOptions
from commplane_cache.tiers import FlatCopier, HostTier

__all__ = ["find_store", "key_scheme", "opened_cache", "store_context"]


@contextmanager
def opened_cache(job: Job, setup: CacheJob, parts: Parts, pool: PagedKV) -> Iterator[PrefixCache]:
    """A cache over the model's pool, a host tier, and the store that is named. Collective over the grid.

    Left without an exception, it is proved that every page has one owner.
    """
    size = pool.layout.page_bytes
    host_memory = torch.zeros(max(1, setup.host // job.page_tokens) * size, dtype=torch.uint8)
    options = CacheOptions(
        page_tokens=job.page_tokens,
        write=setup.write,
        prefetch=setup.policy,
        pipelined=setup.pipelined,
        prefetch_batch_pages=8,  # the prompts are short: few at a time, so that a prefetch can end before it is complete
        timeout_base=setup.patience,
    )
    rounds = parts.plane.sync_round("cache", parts.grid, specs=["cache"], timeout=setup.timeout)
    store = _opened_store(job, setup, parts) if setup.store else None
    try:
        cache = PrefixCache(
            rounds,
            pool.capacity,
            HostTier(host_memory, size),
            store,
            copier=FlatCopier(pool.bytes, host_memory, size),
            options=options,
        )
        yield cache
        cache.check()
        cache.close()
    finally:
        if store is not None:
            store.close()  # ends what still reads from the host memory or writes to it
    rounds.close()


def find_store(plane: commplane.Plane, name: str) -> PageStoreSpec:
    """What plugins say of the page store of that name. Local.

    Raises:
        PluginNotFound: no plugin registers it.
    """
    known = plane.plugins.registered(PageStoreSpec)
    if name not in known:
        raise plane.plugins.not_found("page store", name, known)
    spec = known[name].spec
    assert isinstance(spec, PageStoreSpec)
    return spec


def _opened_store(job: Job, setup: CacheJob, parts: Parts) -> PageStore:
    module, _, attribute = find_store(parts.plane, setup.store).factory.partition(":")
    store: PageStore = getattr(importlib.import_module(module), attribute)()
    if setup.journal:
        store = Journal(store, Path(setup.journal))
    if setup.fault:
        store = FaultyStore(store, setup.fault)
    store.open(store_context(job, setup))
    return store


def store_context(job: Job, setup: CacheJob) -> StoreContext:
    """With what the store of the job's rank is opened. Local."""
    options = {name: _placed(value, job.rank) for name, value in setup.options.items()}
    size = ModelConfig(**job.model).layout(job.tp).page_bytes
    return StoreContext(size, key_scheme(job).namespace, setup.timeout, options)


def key_scheme(job: Job) -> KeyScheme:
    """What the bytes of the pages of the job's rank are. Local."""
    config, shard = ModelConfig(**job.model), shard_of(job)
    heads = config.kv_heads // shard.tp_size
    return KeyScheme(
        model="commplane.demo",
        revision=f"{job.revision}: {config}",
        dtype="float32",
        page_tokens=job.page_tokens,
        layout="layer,kv head,kv,token,dim",
        shard=f"kv heads {shard.tp_rank * heads}+{heads}, tokens of page {shard.cp_rank} of every {shard.cp_size}",
    )


def _placed(value: Any, rank: int) -> Any:
    return value.replace("{rank}", str(rank)) if isinstance(value, str) else value
