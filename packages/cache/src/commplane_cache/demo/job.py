"""The configuration of one rank of the demo, as it travels from the process that starts the ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from commplane.errors import ConfigError
from commplane_cache.demo.stream import Shape

__all__ = ["CacheJob", "Job", "PassJob"]


@dataclass(frozen=True)
class CacheJob:
    """How a cache is set up; equal on all ranks, but for the last four.

    Attributes:
        policy: when a prefetch from storage ends, of `commplane_cache.prefetch.POLICIES`.
        write: when pages go to host and storage, of `commplane_cache.options.WRITES`.
        store: name of the page store, or ``""`` for no storage.
        options: of the store. ``{rank}`` in a text stands for the rank.
        device: tokens that the device pools hold.
        host: tokens that the host pools hold.
        pipelined: a step's round is issued in one step and read in the next.
        timeout: seconds of the deadline of a round, and of a batch of the store.
        patience: seconds that the policy ``"timeout"`` waits for storage, at least.
        fault: what is wrong with this rank's storage, of `commplane_cache.demo.faults.KINDS`, or ``""``.
        journal: file for what this rank's storage acknowledged, or ``""``.
        mute: prompts after whose computation this rank leaves out all rounds on purpose, or 0.
    """

    policy: str = "wait_complete"
    write: str = "write_through"
    store: str = "slab"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: int = 2048
    host: int = 8192
    pipelined: bool = False
    timeout: float = 10.0
    patience: float = 0.2
    fault: str = ""
    journal: str = ""
    mute: int = 0


@dataclass(frozen=True)
class PassJob:
    """The stream once, from beginning to end: with a cache of its own, or without one."""

    name: str
    cache: CacheJob | None = None

    def on_rank(self, **changes: Any) -> PassJob:
        """The same with other fields of the cache, such as a fault of one rank."""
        return self if self.cache is None else replace(self, cache=replace(self.cache, **changes))


@dataclass(frozen=True)
class Job:
    """What one rank does.

    Attributes:
        tp: attention-TP ranks, neighbours in rank order.
        cp: attention-CP ranks; the world is tp x cp.
        passes: one after the other.
        pool: tokens that the device pool holds in a pass without a cache.
        batch: requests that are served at the same time.
        model: fields of `commplane.demo.ModelConfig`.
        revision: of the weights as storage knows it; another one for each demo, whose pages no other one finds.
        rank: global rank.
        world_size: number of ranks.
        port: of the store on this machine where the ranks meet.
        parent: process that started this one.
        out: file for the result.
        progress: whether to say on standard error how far it is.
    """

    tp: int
    cp: int
    shape: Shape
    passes: tuple[PassJob, ...]
    sentences: tuple[str, ...]
    pool: int = 2048
    batch: int = 2
    model: Mapping[str, int] = field(default_factory=dict)
    revision: str = "seeded"
    rank: int = 0
    world_size: int = 1
    port: int = 0
    parent: int = 0
    out: str = ""
    progress: bool = False

    def __post_init__(self) -> None:
        if min(self.tp, self.cp, self.batch) < 1:
            raise ConfigError(f"demo: tp, cp and batch must be 1 or more, found {self.tp}, {self.cp} and {self.batch}")

    @property
    def page_tokens(self) -> int:
        """Tokens in a page of the cache: one page of each context-parallel rank."""
        return self.model.get("page_tokens", 16) * self.cp

    def write(self, path: Path) -> None:
        """Leave it in a file."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        """What `write` left."""
        raw = json.loads(path.read_text())
        raw["shape"], raw["sentences"] = Shape(**raw["shape"]), tuple(raw["sentences"])
        raw["passes"] = tuple(PassJob(p["name"], p["cache"] and CacheJob(**p["cache"])) for p in raw["passes"])
        return cls(**raw)
