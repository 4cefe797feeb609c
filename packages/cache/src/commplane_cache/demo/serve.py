"""What a rank of the demo does: it meets the others and serves the stream once for each pass."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch

import commplane
from commplane.demo import PagedKV
from commplane.errors import ConfigError, PeerError
from commplane_cache.demo.blame import traced
from commplane_cache.demo.cached import CachedPages
from commplane_cache.demo.engine import Engine, NoCache, Pages
from commplane_cache.demo.job import Job, PassJob
from commplane_cache.demo.parts import Parts, build
from commplane_cache.demo.storage import find_store, opened_cache
from commplane_cache.demo.stream import Conversations, arrivals, longest

__all__ = ["serve"]


def serve(job: Job) -> list[dict[str, Any]]:
    """All passes of this rank, as `commplane_cache.demo.report` reads them. Collective over the ranks of the job.

    Raises:
        CommplaneError: the ranks do not agree, or one of them is missing.
    """
    from torch.distributed import TCPStore

    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", job.port, is_master=False, timeout=timedelta(seconds=30))
    with commplane.init(store=store, rank=job.rank, world_size=job.world_size) as plane:
        try:
            for one in job.passes:
                if one.cache is not None and one.cache.store:
                    find_store(plane, one.cache.store)  # before there is anything to wait for
            parts = build(job, plane)
            return [_one_pass(job, one, parts) for one in job.passes]
        except PeerError as error:
            raise traced(store, job.rank, error) from error


def _one_pass(job: Job, one: PassJob, parts: Parts) -> dict[str, Any]:
    layout, setup = parts.config.layout(job.tp), one.cache
    capacity = (job.pool if setup is None else setup.device) // job.page_tokens
    wanted = job.batch * -(-longest(job.shape, job.sentences) // job.page_tokens)
    if capacity < wanted:
        raise ConfigError(
            f"demo: {job.batch} requests at a time need up to {wanted} device pages, found room for {capacity}; raise the tokens "
            "that the device holds"
        )
    pool = PagedKV(layout, torch.zeros(capacity * layout.page_bytes, dtype=torch.uint8))
    if setup is None:
        served = _serve(job, one, parts, pool, NoCache(capacity, job.page_tokens))
        return {"name": one.name, "cached": False, **served, "counters": {}, "digest": 0}
    with opened_cache(job, setup, parts, pool) as cache:
        pages = CachedPages(cache, flush=setup.write == "write_back", mute=setup.mute)
        served = _serve(job, one, parts, pool, pages)
        return {"name": one.name, "cached": True, **served, "counters": cache.counters.to_json(), "digest": cache.digest}


def _serve(job: Job, one: PassJob, parts: Parts, pool: PagedKV, pages: Pages) -> dict[str, Any]:
    def progress(done: int, of: int) -> None:
        if job.progress and (done == of or sys.stderr.isatty()):
            sys.stderr.write(f"\r  {one.name}: {done}/{of} requests" + ("\n" if done == of else ""))
            sys.stderr.flush()

    engine = Engine(parts.model, pool, pages, batch=job.batch, answer=job.shape.answer)
    rows = engine.serve(arrivals(job.shape), Conversations(job.shape, job.sentences), progress)
    return {"requests": rows, "seconds": engine.seconds, "steps": engine.steps}
