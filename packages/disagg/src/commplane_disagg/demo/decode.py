"""What a decode rank does: have the pages of each prompt written into its pool, and go on from them."""

from __future__ import annotations

import zlib
from collections import deque

from torch.distributed import Store

from commplane.demo import PagedKV, Transformer
from commplane_disagg.demo.choice import engine_for
from commplane_disagg.demo.faults import ARRIVED
from commplane_disagg.demo.job import Arrived, Job, Outcome
from commplane_disagg.demo.parts import CONFIG, arguments, meet, model, told
from commplane_disagg.demo.prefill import READY, REGISTRY
from commplane_disagg.demo.unsynced import UNSYNCED_SECONDS
from commplane_disagg.ends import DecodeEnd, PrefillReplica, Report, replica_of
from commplane_disagg.registry import RegistryClient

__all__ = ["run"]

_AT_ONCE = 3
"""Requests of the greatest length that the pool has room for."""


def run(job: Job) -> Outcome:
    """One decode rank, from start to end. Collective over the decode ranks."""
    longest = max(len(prompt) for prompt in job.prompts) + job.options.tokens
    pages = _AT_ONCE * CONFIG.pages(longest)
    with meet(job) as (plane, store):
        choice = engine_for(job, store)
        with DecodeEnd(name=f"decode/{job.rank}", **arguments(job, plane, pages, choice.engine)) as end:
            pool = end.open()
            shard = model(job, plane.communicator("tp"))
            port, source = _source(job, store)
            if job.rank == 0:
                store.set(READY, "")
            arrived = _Serving(job, end, shard, PagedKV(CONFIG.layout(job.size), pool), source, pages).serve(store)
        return Outcome(used=port, engine=choice.engine, arrived=arrived)


def _source(job: Job, store: Store) -> tuple[int, PrefillReplica]:
    """Port of the registry, and where the prefill ranks are according to it, once all of them are."""
    port = int(told(store, REGISTRY))
    timeout = job.options.timeout if job.options.port_sync else UNSYNCED_SECONDS
    with RegistryClient(job.addresses[0], port, token=job.token, timeout=timeout) as client:
        table = client.wait_ready()
    assert table.topology is not None
    return port, replica_of(table.topology, table.rows)


class _Serving:
    """The scheduler of a decode rank: all of them take the same steps."""

    def __init__(self, job: Job, end: DecodeEnd, model: Transformer, cache: PagedKV, source: PrefillReplica, pages: int) -> None:
        self._job, self._end, self._model, self._cache, self._source = job, end, model, cache, source
        self._free = deque(range(pages))
        self._waiting = deque(range(len(job.prompts)))
        self._pages: dict[int, list[int]] = {}
        self._ready: deque[int] = deque()
        self._lent: set[int] = set()
        self._arrived: dict[int, Arrived] = {}

    def serve(self, store: Store) -> dict[int, Arrived]:
        """All prompts: what came of each. Raises the first room's error, on all ranks in the same step."""
        while self._waiting or self._pages:
            self._admit()
            self._absorb(self._end.step(0.0 if self._ready else 0.001))
            if self._ready:
                if self._job.rank == 0:
                    store.set(ARRIVED, "")
                self._answer(self._ready.popleft())
        return self._arrived

    def _admit(self) -> None:
        while self._waiting:
            room = self._waiting[0]
            prompt = len(self._job.prompts[room])
            count = CONFIG.pages(prompt + self._job.options.tokens)
            if len(self._free) < count:
                return
            self._pages[room] = [self._free.popleft() for _ in range(count)]
            self._end.receive(room, self._pages[room][: CONFIG.pages(prompt)], self._source)
            self._lent.add(room)
            self._waiting.popleft()

    def _answer(self, room: int) -> None:
        prompt, pages = self._job.prompts[room], self._pages[room]
        whole = pages[: len(prompt) // CONFIG.page_tokens]
        sums = tuple(zlib.crc32(self._cache.bytes[page].numpy().tobytes()) for page in whole)
        # Only the last token is computed anew, for what follows it; all before it is in the pages that came.
        tokens = [self._model.prefill(prompt, self._cache, pages, len(prompt) - 1)]
        while len(tokens) < self._job.options.tokens:
            self._absorb(self._end.step())
            tokens.append(self._model.decode(tokens[-1], len(prompt) + len(tokens) - 1, self._cache, pages))
        self._arrived[room] = Arrived(tokens=tuple(tokens), pages=sums)
        self._give_back(room)

    def _absorb(self, report: Report) -> None:
        for result in report.results:
            if result.error is not None:
                raise result.error
            self._ready.append(result.room)
        for lent in report.released:
            self._lent.discard(lent.room)
            self._give_back(lent.room)

    def _give_back(self, room: int) -> None:
        if room in self._arrived and room not in self._lent:
            self._free.extend(self._pages.pop(room))
