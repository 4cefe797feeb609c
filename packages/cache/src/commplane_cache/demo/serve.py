"""What a rank of the demo does: it meets the others, builds its part of the model, and serves the stream once for each pass."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

import commplane
from commplane.demo import ModelConfig, PagedKV, Shard, Transformer
from commplane_cache.demo.engine import Engine, NoCache, Pages
from commplane_cache.demo.job import Job
from commplane_cache.demo.stream import Conversations, arrivals

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
        config = ModelConfig(**job.model)
        tp_rank, cp_rank = job.rank % job.tp, job.rank // job.tp
        shard = Shard(tp_rank, job.tp, cp_rank, job.cp)
        tp_ranks = [cp_rank * job.tp + i for i in range(job.tp)]
        cp_ranks = [i * job.tp + tp_rank for i in range(job.cp)]
        model = Transformer(config, shard, tp_sum=_summing(plane, "tp", tp_ranks), cp_sum=_summing(plane, "cp", cp_ranks))
        out: list[dict[str, Any]] = []
        for name, cached in job.passes:
            layout = config.layout(job.tp)
            pool = PagedKV(layout, bytearray(job.cache.device * layout.page_bytes))
            pages: Pages = NoCache(pool.capacity, config.page_tokens * job.cp)
            engine = Engine(model, pool, pages, batch=job.batch, answer=job.shape.answer)
            turns = arrivals(job.shape)
            start = time.perf_counter()

            def progress(done: int, of: int, name: str = name) -> None:
                if job.progress and (done == of or sys.stderr.isatty()):
                    end = "\n" if done == of else ""
                    sys.stderr.write(f"\r  {name}: {done}/{of} requests{end}")
                    sys.stderr.flush()

            rows = engine.serve(turns, Conversations(job.shape, job.sentences), progress)
            out.append(
                {
                    "name": name,
                    "cached": cached,
                    "requests": rows,
                    "seconds": time.perf_counter() - start,
                    "steps": engine.steps,
                    "counters": {},
                }
            )
        return out


def _summing(plane: commplane.Plane, name: str, ranks: Sequence[int]) -> Callable[[torch.Tensor], object] | None:
    """Sums over a group of the model, in place; None where the group is this rank alone. Collective over `ranks`."""
    if len(ranks) == 1:
        return None
    communicator = plane.communicator(f"attention_{name}", ranks, device="cpu")
    return lambda tensor: communicator.all_reduce_(tensor)
