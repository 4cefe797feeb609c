"""A prefill replica and a decode replica in one thread, over real sockets and a real engine; what the tests of ends share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from commplane.api.transfer import TransferEngine
from commplane.testing import SimulatedRounds
from commplane_disagg.ends import Address, DecodeEnd, KvLayout, PrefillEnd, PrefillReplica, Report
from commplane_disagg.ends.end import End
from commplane_disagg.engines.shm import SharedMemory
from commplane_disagg.ranks import Grid, Kv, holding
from commplane_disagg.rooms import ROOMS

KV = Kv(layers=4, heads=4)
ONE = Grid()
TOKEN = b"a token of the tests"


def layout_of(kv: Kv, grid: Grid, rank: int, *, pages: int = 16, tokens: int = 2, row: int = 8, **how: bool) -> KvLayout:
    """A small pool for a rank; `how`: ``layer_major`` or ``heads_first``."""
    held = holding(kv, grid, rank)
    parts = 1 if kv.kind == "mla" else 2
    common = {"pages": pages, "layers": held.layers, "heads": held.heads, "tokens": tokens, "row": row, "parts": parts}
    return KvLayout.layer_major(**common) if how.pop("layer_major", False) else KvLayout.page_major(**common, **how)


class Side:
    """All ends of one replica."""

    def __init__(
        self,
        kind: type[PrefillEnd] | type[DecodeEnd],
        grid: Grid = ONE,
        *,
        kv: Kv = KV,
        engine: Callable[[], TransferEngine] = SharedMemory,
        capabilities: Sequence[str] = ("quiet",),
        layout: Callable[[int], KvLayout] | None = None,
        name: str = "",
        **settings: Any,
    ) -> None:
        self.grid, self.kv = grid, kv
        self.name = name or kind.side
        self.rounds = SimulatedRounds(grid.size, [ROOMS])
        layout = layout or (lambda rank: layout_of(kv, grid, rank))
        self.ends: list[Any] = [
            kind(
                name=f"{self.name}/{rank}",
                kv=kv,
                grid=grid,
                rank=rank,
                layout=layout(rank),
                engine=engine(),
                engine_name="shm",
                capabilities=capabilities,
                rounds=self.rounds[rank],
                token=TOKEN,
                **settings,
            )
            for rank in range(grid.size)
        ]
        self.pools = [end.open() for end in self.ends]
        self.reports: list[list[Report]] = [[] for _ in self.ends]

    def step(self) -> None:
        """One step of every rank."""
        for end, votes in zip(self.ends, self.rounds, strict=True):
            votes.issue(end.votes(), digest=end.table.digest)
        for end, votes, reports in zip(self.ends, self.rounds, self.reports, strict=True):
            reports.append(end.settle(votes.result()))

    def source(self) -> PrefillReplica:
        """This replica as decode sees it."""
        return PrefillReplica(self.grid, {r: Address(end.name, end.host, end.port) for r, end in enumerate(self.ends)})

    def results(self, rank: int = 0) -> list[tuple[int, int, bool]]:
        """(room, generation, whether it succeeded) of each room that ended on a rank, in order."""
        return [(r.room, r.generation, r.ok) for report in self.reports[rank] for r in report.results]

    def errors(self, rank: int = 0) -> list[str]:
        """Texts of the rooms that failed on a rank."""
        return [str(r.error) for report in self.reports[rank] for r in report.results if not r.ok]

    def released(self, rank: int = 0) -> list[int]:
        """Rooms whose pages came back on a rank."""
        return [r.room for report in self.reports[rank] for r in report.released]

    def quarantined(self, rank: int = 0) -> list[int]:
        """Rooms whose pages went into quarantine on a rank."""
        return [r.room for report in self.reports[rank] for r in report.quarantined]

    def close(self) -> None:
        for end in self.ends:
            end.close()


def run_until(done: Callable[[], bool], *sides: Side, deadline: float = 10.0) -> None:
    """Step all sides until `done`; an error if that does not come about."""
    until = time.monotonic() + deadline
    while not done():
        assert time.monotonic() < until, [(e.name, e.stats(), e.channel.refused) for s in sides for e in s.ends]
        for side in sides:
            side.step()
        time.sleep(0.0005)


def fill(side: Side, seed: int = 1) -> None:
    """Write into every pool what the whole model has: the bytes of (page, layer, part, token, head) are a function of these."""
    for end, pool in zip(side.ends, side.pools, strict=True):
        for where, what in cells(end):
            pool[where : where + len(what(seed))] = what(seed)


def cells(end: End) -> list[tuple[int, Callable[[int], bytes]]]:
    """Offset of every row of a pool, and what belongs there."""
    layout = end.card.layout
    out = []
    for layer in range(*layout.layers):
        for part in range(layout.parts):
            for page in range(layout.pages):
                for token in range(layout.tokens):
                    for head in range(*layout.heads):
                        steps = (layer - layout.layers[0], part, page, token, head - layout.heads[0])
                        where = layout.base + sum(s * n for s, n in zip(layout.strides, steps, strict=True))
                        out.append((where, row_bytes(layout.row, page, layer, part, token, head)))
    return out


def row_bytes(size: int, page: int, layer: int, part: int, token: int, head: int) -> Callable[[int], bytes]:
    return lambda seed: random.Random(f"{seed}/{page}/{layer}/{part}/{token}/{head}").randbytes(size)


def expect(side: Side, rank: int, moved: dict[int, int], seed: int = 1) -> None:
    """A decode pool holds the pages `moved` (page here -> page at prefill), and zeros everywhere else."""
    end, pool = side.ends[rank], side.pools[rank]
    layout = end.card.layout
    wanted = bytearray(len(pool))
    for layer in range(*layout.layers):
        for part in range(layout.parts):
            for page, origin in moved.items():
                for token in range(layout.tokens):
                    for head in range(*layout.heads):
                        steps = (layer - layout.layers[0], part, page, token, head - layout.heads[0])
                        where = layout.base + sum(s * n for s, n in zip(layout.strides, steps, strict=True))
                        wanted[where : where + layout.row] = row_bytes(layout.row, origin, layer, part, token, head)(seed)
    assert bytes(pool) == bytes(wanted)
