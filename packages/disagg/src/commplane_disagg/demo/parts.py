"""What a prefill rank and a decode rank set up alike: the plane, the model, the pool and the transfer engine."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore

import commplane
from commplane.api import TransferEngine, TransferSpec
from commplane.demo import ModelConfig, Shard, Transformer
from commplane.errors import ConfigError, PeerError
from commplane_disagg.demo.job import Job
from commplane_disagg.ends import KvLayout
from commplane_disagg.ranks import Grid, Kv
from commplane_disagg.rooms import ROOMS

__all__ = ["CONFIG", "arguments", "layout", "meet", "model", "told"]

CONFIG = ModelConfig()


@contextlib.contextmanager
def meet(job: Job) -> Iterator[tuple[commplane.Plane, Store]]:
    """The plane of this rank's side, and the store that all ranks of both sides share."""
    store = TCPStore(job.store[0], job.store[1], is_master=False, timeout=timedelta(seconds=job.options.timeout))
    config = {"timeout": job.options.timeout}
    with commplane.init(store=PrefixStore(job.side, store), rank=job.rank, world_size=job.size, config=config) as plane:
        yield plane, store


def told(store: Store, key: str) -> str:
    """What another rank writes into the store.

    Raises:
        PeerError: nobody did in time.
    """
    try:
        return bytes(store.get(key)).decode()
    except RuntimeError as error:  # torch's own errors of a store, a timeout among them
        raise PeerError(f"no rank said {key!r} in time: {str(error).partition(chr(10))[0]}") from error


def model(job: Job, tp: commplane.Communicator) -> Transformer:
    """This rank's shard, summed over the ranks of its side."""
    shard = Transformer(CONFIG, Shard(job.rank, job.size), tp_sum=tp.all_reduce_ if job.size > 1 else None)
    tp.prepare("all_reduce", dtype=torch.float64, max_bytes=shard.message_bytes()[0])
    return shard


def layout(rank: int, size: int, pages: int) -> KvLayout:
    """Of a pool of `commplane.demo` in the words of the ends: ``[page][layer][kv head][k, v][token][head_dim]``, float32."""
    page, heads = CONFIG.layout(size), CONFIG.kv_heads // size
    row = CONFIG.head_dim * 4
    return KvLayout(
        pages=pages,
        layers=(0, CONFIG.layers),
        heads=(rank * heads, (rank + 1) * heads),
        tokens=CONFIG.page_tokens,
        row=row,
        dtype="float32",
        strides=(page.layer_bytes, CONFIG.page_tokens * row, page.page_bytes, row, page.head_bytes),
    )


def arguments(job: Job, plane: commplane.Plane, pages: int, name: str) -> dict[str, Any]:
    """What both kinds of ends are made with; `name` is that of the engine.

    Raises:
        ConfigError: no plugin has an engine of that name.
    """
    registered = plane.plugins.registered(TransferSpec)
    if name not in registered:
        raise ConfigError(f"no transfer engine {name!r}: wanted one of {', '.join(registered)}")
    spec = registered[name].spec
    assert isinstance(spec, TransferSpec)
    return {
        "kv": Kv(CONFIG.layers, CONFIG.kv_heads),
        "grid": Grid(tp=job.size),
        "rank": job.rank,
        "layout": layout(job.rank, job.size, pages),
        "engine": _engine(spec),
        "engine_name": name,
        "capabilities": spec.capabilities,
        "rounds": plane.sync_round("rooms", specs=[ROOMS]) if job.size > 1 else None,
        "token": job.token,
        "host": job.host,
        "timeout": job.options.timeout,
    }


def _engine(spec: TransferSpec) -> TransferEngine:
    module, _, attribute = spec.factory.partition(":")
    engine = getattr(importlib.import_module(module), attribute)()
    assert isinstance(engine, TransferEngine)
    return engine
