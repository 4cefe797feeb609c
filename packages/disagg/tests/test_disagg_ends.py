"""Pages go from a prefill replica to a decode replica, through real sockets and a real engine, in one thread."""

from __future__ import annotations

import pytest
from disagg_sides import KV, Side, expect, fill, layout_of, run_until

from commplane_disagg.ends import DecodeEnd, PrefillEnd
from commplane_disagg.ranks import Grid, Kv

pytestmark = pytest.mark.timeout(60)

MLA = Kv(layers=4, heads=1, kind="mla")


@pytest.mark.parametrize(
    ("kv", "prefill", "decode"),
    [
        (KV, Grid(), Grid()),
        (KV, Grid(tp=2), Grid(tp=2)),
        (KV, Grid(tp=2), Grid(tp=4)),
        (KV, Grid(tp=4), Grid(tp=2)),
        (KV, Grid(tp=8), Grid(tp=2)),
        (KV, Grid(tp=2, pp=2), Grid(tp=2)),
        (KV, Grid(pp=2), Grid(pp=4)),
        (KV, Grid(tp=2, cp=2), Grid(tp=1)),
        (KV, Grid(tp=2, cp=2, cp_pages="dealt"), Grid(tp=1)),
        (MLA, Grid(tp=4), Grid(tp=2)),
        (MLA, Grid(tp=2), Grid(tp=4)),
    ],
    ids=str,
)
def test_every_decode_rank_gets_the_pages_it_asked_for_and_nothing_else(kv: Kv, prefill: Grid, decode: Grid) -> None:
    p = Side(PrefillEnd, prefill, kv=kv)
    d = Side(DecodeEnd, decode, kv=kv, layout=lambda r: layout_of(kv, decode, r, heads_first=True))
    try:
        fill(p)
        here, there = [3, 9, 1, 0, 7], [5, 4, 11, 2, 6]
        for end in d.ends:
            end.receive(7, there, p.source())
        for end in p.ends:
            phase, every = (end.card.rank // prefill.tp % prefill.cp, prefill.cp) if prefill.cp_pages == "dealt" else (0, 1)
            end.send(7, here[phase::every])
        run_until(lambda: all(s.results(r) for s in (p, d) for r in range(s.grid.size)), p, d)
        for side in (p, d):
            for rank in range(side.grid.size):
                assert side.results(rank) == [(7, 0, True)]
                assert side.released(rank) == [7]
        for rank in range(decode.size):
            expect(d, rank, dict(zip(there, here, strict=True)))
    finally:
        p.close()
        d.close()
