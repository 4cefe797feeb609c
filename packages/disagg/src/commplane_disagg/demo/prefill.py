"""What a prefill rank does: register, compute prompts, and give their pages to be written as soon as they are complete."""

from __future__ import annotations

import time
from collections import deque

from torch.distributed import Store

from commplane.demo import PagedKV, Transformer
from commplane_disagg.demo.choice import engine_for
from commplane_disagg.demo.faults import DONE
from commplane_disagg.demo.job import Job, Outcome, Sent, node_of
from commplane_disagg.demo.parts import CONFIG, arguments, meet, model, told
from commplane_disagg.demo.unsynced import join_unsynced
from commplane_disagg.ends import PrefillEnd, Report, row_of
from commplane_disagg.port import BoundSocket, bind_listener
from commplane_disagg.registry import join
from commplane_disagg.wire import Coordinate, Topology

__all__ = ["READY", "REGISTRY", "run", "topology"]

REGISTRY = "registry"
"""Key of the store under which the port is that the decode side is given, as its users or its router are."""

READY = "decode is ready"
"""Key that the first decode rank writes: what is measured has no start-up in it."""

_AT_ONCE = 3
"""Prompts of the greatest length that the pool has room for: later ones wait until pages come back."""


def topology(size: int) -> Topology:
    """What the prefill ranks declare."""
    return Topology(
        tp=size,
        page_size=CONFIG.page_tokens,
        kv_dtype="float32",
        kv_layout="page, layer, head, part, token",
        layers=CONFIG.layers,
        kv_heads=CONFIG.kv_heads,
        head_dim=CONFIG.head_dim,
        model=f"commplane.demo seed {CONFIG.seed}",
    )


def run(job: Job) -> Outcome:
    """One prefill rank, from start to end. Collective over the prefill ranks."""
    pages = _AT_ONCE * max(CONFIG.pages(len(prompt)) for prompt in job.prompts)
    with meet(job) as (plane, store):
        bound, here = _bind(job, store)
        if job.rank == 0:
            store.set(REGISTRY, str(here))
        key, choice = Coordinate(tp=job.rank), engine_for(job, store)
        with PrefillEnd(name=f"prefill/{key}", **arguments(job, plane, pages, choice.engine)) as end:
            pool = end.open()
            row = row_of(end, key)
            common = {"registry_host": job.addresses[0], "bound": bound, "token": job.token, "timeout": job.options.timeout}
            if job.options.port_sync:
                nodes = len({node_of(job.side, r, job.size) for r in range(job.size)})
                member = join(topology(job.size), row, plane=plane, nnodes=nodes, **common)  # type: ignore[arg-type]
            else:
                member = join_unsynced(topology(job.size), row, port=here, leads=job.rank == 0, **common)  # type: ignore[arg-type]
            with member:
                tp = plane.communicator("tp")
                shard = model(job, tp)
                cache = PagedKV(CONFIG.layout(job.size), pool)
                told(store, READY)
                serving = _Serving(job, end, shard, cache, pages)
                for room in range(len(job.prompts)):
                    if job.options.fault and room == len(job.prompts) - 1:
                        serving.drain()
                        if job.rank == 0:  # whose node keeps its cable: torch's store waits for ever where one is cut
                            told(store, DONE)
                        tp.barrier()
                        if job.options.fault == "registry" and member.server is not None:
                            member.server.close()
                    serving.compute(room)
                serving.drain()
                plane.gather("done", what="the end of the demo")  # the registry stays until all ranks are done
            return Outcome(bound=here, used=member.port, engine=choice.engine, refused=dict(choice.refused), sent=serving.sent)


def _bind(job: Job, store: Store) -> tuple[BoundSocket | None, int]:
    """A port on each node, bound by its first rank and told to its others: this rank's socket, and its node's port."""
    leads = job.rank == 0 or node_of(job.side, job.rank - 1, job.size) != job.node
    key = f"port of node {job.node}"
    if leads:
        bound = bind_listener(job.host)
        store.set(key, str(bound.port))
        return bound, bound.port
    return None, int(told(store, key))


class _Serving:
    """The scheduler of a prefill rank: all of them take the same steps."""

    def __init__(self, job: Job, end: PrefillEnd, model: Transformer, cache: PagedKV, pages: int) -> None:
        self._job, self._end, self._model, self._cache = job, end, model, cache
        self._free = deque(range(pages))
        self._given: dict[int, tuple[int, float, float]] = {}
        self.sent: dict[int, Sent] = {}
        self._lent = 0

    def drain(self) -> None:
        """Step until every room has ended. Raises the first room's error, as `compute` does, on all ranks in the same step."""
        while self._lent:
            self._absorb(self._end.step(0.001))

    def compute(self, room: int) -> None:
        """Compute a prompt, and give its pages away."""
        prompt = self._job.prompts[room]
        count, size = CONFIG.pages(len(prompt)), CONFIG.page_tokens
        while len(self._free) < count:
            self._absorb(self._end.step(0.001))
        pages = [self._free.popleft() for _ in range(count)]
        self._lent += count
        self._end.open_room(room)
        computing, token, done = 0.0, 0, 0
        while done < len(prompt):
            stop = min(done + self._model.chunk, len(prompt))
            begun = time.perf_counter()
            token = self._model.prefill(prompt[:stop], self._cache, pages, done)
            computing += time.perf_counter() - begun
            last = stop == len(prompt)
            # A chunk is a whole number of pages, so these are complete, and travel while the next ones are computed.
            self._end.send(room, pages[done // size : CONFIG.pages(stop)], last=last)
            if last:
                self._given[room] = token, computing, time.perf_counter()
            self._absorb(self._end.step())
            done = stop

    def _absorb(self, report: Report) -> None:
        for result in report.results:
            if result.error is not None:
                raise result.error
            token, computing, given = self._given[result.room]
            self.sent[result.room] = Sent(token=token, computing=computing, moving=time.perf_counter() - given)
        for lent in report.released:
            self._free.extend(lent.pages)
            self._lent -= len(lent.pages)
