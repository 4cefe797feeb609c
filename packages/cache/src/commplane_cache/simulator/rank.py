"""One rank: an engine with its cache. What may differ between ranks differs here: storage, copies, memory, clock."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from commplane.api import SyncRound
from commplane.errors import CommplaneError
from commplane_cache.cache import PrefixCache
from commplane_cache.options import CacheOptions
from commplane_cache.simulator.workload import Job, Step
from commplane_cache.testing import SeededStore
from commplane_cache.tiers import HostTier
from commplane_cache.tree import Node
from commplane_cache.work import Work

__all__ = ["Faults", "Rank"]


@dataclass(frozen=True)
class Faults:
    """What goes wrong on some rank and not on the others.

    Attributes:
        delay: the most steps that storage or a copy takes.
        batch: portion of storage batches that fail on some rank.
        page: portion of pages that some rank's storage loses, each time it is asked.
        copy: portion of copies between device and host that raise on some rank.
        surplus: the most pages that a rank has on each tier beyond the others.
    """

    delay: int = 4
    batch: float = 0.08
    page: float = 0.04
    copy: float = 0.03
    surplus: int = 3

    def of_one(self, ranks: int) -> Faults:
        """The same with portions for each of `ranks` ranks."""
        batch, page, copy = (1 - (1 - portion) ** (1 / ranks) for portion in (self.batch, self.page, self.copy))
        return Faults(self.delay, batch, page, copy, self.surplus)


class _Late:
    """A copy whose bytes move when it ends."""

    __slots__ = ("_left", "_move")

    def __init__(self, left: int, move: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]) -> None:
        self._left, self._move = left, move

    def query(self) -> bool:
        self._left -= 1
        if self._left > 0:
            return False
        to, to_pages, source, pages = self._move
        to[to_pages] = source[pages]
        return True


class _LateCopier:
    """Copies that take a while on some ranks, or raise. Pages are 8 bytes."""

    def __init__(self, device: np.ndarray, host: np.ndarray, draw: random.Random, faults: Faults) -> None:
        self._device, self._host, self._random, self._faults = device, host, draw, faults

    def to_host(self, device: np.ndarray, host: np.ndarray) -> _Late | None:
        left = self._late()
        if left:  # the device may be written right after the call, as on a stream: the bytes of now are meant
            return _Late(left, (self._host, host, self._device[device], np.arange(len(device))))
        self._host[host] = self._device[device]
        return None

    def to_device(self, host: np.ndarray, device: np.ndarray) -> _Late | None:
        left = self._late()
        if left:
            return _Late(left, (self._device, device, self._host, host))
        self._device[device] = self._host[host]
        return None

    def _late(self) -> int:
        if self._random.random() < self._faults.copy:
            raise OSError("the copy failed, as the seed said")
        return self._random.randrange(self._faults.delay + 1) if self._random.random() < 0.3 else 0


class _Request:
    __slots__ = ("due", "job", "load", "tries")

    def __init__(self, job: Job, step: int) -> None:
        self.job, self.due, self.tries = job, step + job.idle, 0
        self.load: Work | None = None


class Rank:
    """An engine on one rank. It takes its decisions from what its cache says, and must come to those of all other ranks.

    Attributes:
        cache: the cache.
        computed: pages that had to be computed.
        served: requests that ran.
        reused: pages that were found, each one looked at.
    """

    def __init__(
        self, number: int, seed: int, rounds: SyncRound, options: CacheOptions, faults: Faults, device: int, host: int
    ) -> None:
        draw = self._random = random.Random(f"rank {number} {seed}")
        self.number = number
        self._rate, self._time = draw.uniform(0.5, 2.0), draw.uniform(0, 1000)
        device, host = device + draw.randint(0, faults.surplus), host + draw.randint(0, faults.surplus)
        self._device, self._host = np.zeros(device, np.int64), np.zeros(host, np.int64)
        self.store = SeededStore(draw.randrange(1 << 30), delay=faults.delay, fail=faults.batch, lose=faults.page)
        self.cache = PrefixCache(
            rounds,
            device,
            HostTier(self._host, 8),
            self.store,
            copier=_LateCopier(self._device, self._host, draw, faults),
            options=options,
            clock=lambda: self._time,
        )
        self.computed = self.served = self.reused = 0
        self._step = 0
        self._waiting: list[_Request] = []
        self._running: list[tuple[int, Node, np.ndarray]] = []
        self._late_aborts: list[tuple[int, int]] = []

    @property
    def waits(self) -> bool:
        """Whether requests wait or run."""
        return bool(self._waiting or self._running or self._late_aborts)

    def check(self) -> None:
        """Prove that no page is lost or owned twice, and that every page of the tree has the bytes of its tokens."""
        self.cache.check()
        for node in self.cache.tree.nodes():
            marks = np.frombuffer(b"".join(name[:8] for name in node.names or ()), "<i8")
            for tier, memory, pages, ready in (
                ("device", self._device, node.device, node.device_ready),
                ("host", self._host, node.host, node.host_ready),
            ):
                if ready and (memory[pages] != marks).any():
                    raise CommplaneError(f"simulator: rank {self.number} has other bytes than it should in {node} on the {tier}")

    def play(self, step: Step) -> None:
        """What the engine does between two rounds."""
        cache = self.cache
        self._step += 1
        self._time += self._rate * self._random.random()
        for job in step.arrivals:
            cache.prefetch(job.name, job.run, cache.match(job.run, priority=job.priority))
            self._waiting.append(_Request(job, self._step))
        for job, heard in step.aborts:
            self._waiting = [request for request in self._waiting if request.job is not job]
            self._late_aborts.append((self._step + heard[self.number], job.name))
        if self._late_aborts:
            for when, name in self._late_aborts:
                if when == self._step:
                    cache.release_aborted_request(name)
                elif when > self._step:  # it has not heard of it, and asks on
                    cache.check_prefetch_progress(name)
            self._late_aborts = [entry for entry in self._late_aborts if entry[0] > self._step]
        while self._running and self._running[0][0] <= self._step:
            _, node, own = self._running.pop(0)
            cache.unlock(node)
            if len(own):
                cache.release(own)
        if self._waiting and self._random.random() < 0.1:  # and it may ask when the others do not
            cache.check_prefetch_progress(self._random.choice(self._waiting).job.name)
        turn = [request for request in self._waiting if request.due <= self._step][:3]
        if turn:
            request = turn[self._step % len(turn)]
            if self._admit(request):
                self._waiting.remove(request)

    def _admit(self, request: _Request) -> bool:
        """Whether the request does not wait any more."""
        cache, job = self.cache, request.job
        if request.load is not None:
            if request.load.agreed is None:
                return False
        elif not cache.check_prefetch_progress(job.name):
            return False
        known = cache.match(job.run, priority=job.priority, again=True)
        if known.host and request.load is None:
            request.load = cache.load_back(known)
            if request.load is not None:
                return False
        self._look(known.pages, job)
        cache.lock(known.device_node)
        own = cache.allocate(job.run.pages - known.device + job.more)
        if own is None:
            cache.unlock(known.device_node)
            request.tries += 1
            return request.tries > 8  # it is too large for what the others leave
        mine, more = own[: len(own) - job.more], own[len(own) - job.more :]
        self._device[mine] = job.marks[known.device :]
        done = cache.insert(job.run, mine, start=known.device, priority=job.priority)
        self._look(done.pages, job, known.device)
        cache.lock(done.node)
        cache.unlock(known.device_node)
        self._running.append((self._step + job.steps, done.node, more))
        self._running.sort(key=lambda entry: entry[0])
        self.computed += len(mine)
        self.reused += known.device
        self.served += 1
        return True

    def _look(self, pages: np.ndarray, job: Job, start: int = 0) -> None:
        marks = job.marks[start : start + len(pages)]
        if (self._device[pages] != marks).any():
            raise CommplaneError(f"simulator: rank {self.number} would serve request {job.name} from pages with other bytes")
