"""The configuration of one rank of the demo, as it travels from the process that starts the ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from commplane.errors import ConfigError
from commplane_cache.demo.stream import Shape

__all__ = ["CacheJob", "Job"]


@dataclass(frozen=True)
class CacheJob:
    """How the cache of the demo is set up; equal on all ranks.

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
    """

    policy: str = "wait_complete"
    write: str = "write_through"
    store: str = "slab"
    options: Mapping[str, Any] = field(default_factory=dict)
    device: int = 2560
    host: int = 8192
    pipelined: bool = False
    timeout: float = 10.0
    patience: float = 0.2


@dataclass(frozen=True)
class Job:
    """What one rank does.

    Attributes:
        tp: attention-TP ranks; neighbours in rank order.
        cp: attention-CP ranks; the world is tp x cp.
        passes: name of each pass over the stream, and whether the cache is on.
        batch: requests that are served at the same time.
        model: fields of `commplane.demo.ModelConfig`.
        fault: what is wrong with this rank's storage, of `commplane_cache.demo.faults.KINDS`, or ``""``.
        journal: file for what this rank's storage acknowledged, or ``""``.
        skip: the sync round that this rank leaves out on purpose, or 0.
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
    passes: tuple[tuple[str, bool], ...]
    sentences: tuple[str, ...]
    cache: CacheJob = field(default_factory=CacheJob)
    batch: int = 2
    model: Mapping[str, int] = field(default_factory=dict)
    fault: str = ""
    journal: str = ""
    skip: int = 0
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

    def placed(self, **changes: Any) -> Job:
        """The same job with other fields, such as for another rank."""
        return replace(self, **changes)

    def write(self, path: Path) -> None:
        """Leave it in a file."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        """What `write` left."""
        raw = json.loads(path.read_text())
        raw["shape"], raw["cache"] = Shape(**raw["shape"]), CacheJob(**raw["cache"])
        raw["passes"] = tuple((name, cached) for name, cached in raw["passes"])
        return cls(**{**raw, "sentences": tuple(raw["sentences"])})
