"""Runs of bytes between two layouts are those of a copy row by row, and no more of them than there have to be."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane.errors import ConfigError, UnsupportedOperation
from commplane_disagg.ends import KvLayout, grid_of, kv_of, replica_of
from commplane_disagg.ends.layout import copies
from commplane_disagg.ranks import Grid, Kv
from commplane_disagg.wire import Coordinate, Row, Topology

pytestmark = pytest.mark.timeout(60)

ROW = 4


@st.composite
def layouts(draw: st.DrawFn, tokens: int, parts: int, layers: tuple[int, int], heads: tuple[int, int]) -> KvLayout:
    """Any order of the dimensions, with gaps, that holds at least these layers and heads."""
    layers = layers[0] - draw(st.integers(0, min(1, layers[0]))), layers[1] + draw(st.integers(0, 1))
    heads = heads[0] - draw(st.integers(0, min(1, heads[0]))), heads[1] + draw(st.integers(0, 1))
    pages = draw(st.integers(3, 6))
    counts = [layers[1] - layers[0], parts, pages, tokens, heads[1] - heads[0]]
    strides, step = [0] * 5, ROW
    for dim in draw(st.permutations(range(5))):
        strides[dim] = step
        step = step * counts[dim] + draw(st.sampled_from([0, 0, 0, 8]))
    how = {"pages": pages, "layers": layers, "heads": heads, "tokens": tokens, "row": ROW, "parts": parts}
    return KvLayout(**how, base=draw(st.sampled_from([0, 16])), strides=tuple(strides))


def offset(layout: KvLayout, layer: int, part: int, page: int, token: int, head: int) -> int:
    steps = (layer - layout.layers[0], part, page, token, head - layout.heads[0])
    return layout.base + sum(s * n for s, n in zip(layout.strides, steps, strict=True))


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_runs_of_bytes_are_those_of_a_copy_row_by_row(data: st.DataObject) -> None:
    tokens, parts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    layers = data.draw(st.tuples(st.integers(0, 2), st.integers(1, 3)).map(lambda t: (t[0], t[0] + t[1])))
    heads = data.draw(st.tuples(st.integers(0, 2), st.integers(1, 3)).map(lambda t: (t[0], t[0] + t[1])))
    here = data.draw(layouts(tokens, parts, layers, heads))
    there = data.draw(layouts(tokens, parts, layers, heads))
    pages = list(zip(data.draw(st.permutations(range(3))), data.draw(st.permutations(range(3))), strict=True))
    source = random.Random(0).randbytes(here.nbytes)
    by_rows, by_runs = bytearray(there.nbytes), bytearray(there.nbytes)
    cells = itertools.product(range(*layers), range(parts), pages, range(tokens), range(*heads))
    for layer, part, (mine, theirs), token, head in cells:
        a, b = offset(here, layer, part, mine, token, head), offset(there, layer, part, theirs, token, head)
        by_rows[b : b + ROW] = source[a : a + ROW]
    for a, b, n in zip(*copies(here, there, layers, heads, pages), strict=True):
        assert 0 <= a <= here.nbytes - n and 0 <= b <= there.nbytes - n
        by_runs[b : b + n] = source[a : a + n]
    assert by_runs == by_rows


def test_equal_layouts_are_copied_in_whole_pages_and_neighbours_in_one_run() -> None:
    how = {"pages": 8, "layers": (0, 4), "heads": (0, 2), "tokens": 16, "row": 64}
    page = KvLayout.page_major(**how)
    size = page.page_bytes
    assert copies(page, page, (0, 4), (0, 2), [(2, 5), (3, 6), (5, 0)]) == ([2 * size, 5 * size], [5 * size, 0], [2 * size, size])
    layer = KvLayout.layer_major(**how)
    assert [len(x) for x in copies(layer, layer, (0, 4), (0, 2), [(2, 5)])] == [8, 8, 8]  # one for each layer's keys and values
    heads = KvLayout.page_major(**how, heads_first=True)
    assert set(copies(page, heads, (0, 4), (0, 2), [(0, 0)])[2]) == {64}
    assert set(copies(heads, heads, (1, 3), (1, 2), [(0, 0)])[2]) == {64 * 16}


def test_what_does_not_fit_is_refused_with_both_values() -> None:
    how = {"pages": 8, "layers": (0, 4), "heads": (0, 2), "tokens": 16, "row": 64}
    one = KvLayout.page_major(**how)
    for other, found in (
        ({"tokens": 32}, "tokens is 16 here and 32 there"),
        ({"dtype": "bfloat16"}, "dtype is '' here and 'bfloat16' there"),
        ({"parts": 1}, "parts is 2 here and 1 there"),
    ):
        with pytest.raises(UnsupportedOperation, match=found):
            copies(one, KvLayout.page_major(**{**how, **other}), (0, 4), (0, 2), [])
    with pytest.raises(UnsupportedOperation, match="remote page 8 is outside of a pool of 8"):
        copies(one, one, (0, 4), (0, 2), [(0, 8)])
    with pytest.raises(UnsupportedOperation, match=r"layers \(3, 5\) are not among the local \(0, 4\)"):
        copies(one, one, (3, 5), (0, 2), [])
    with pytest.raises(UnsupportedOperation, match=r"heads \(1, 3\)"):
        copies(one, one, (0, 1), (1, 3), [])


def test_a_table_of_rows_becomes_a_replica() -> None:
    topology = Topology(
        dp=2,
        tp=2,
        cp=2,
        page_size=4,
        kv_dtype="float32",
        layers=6,
        kv_heads=4,
        head_dim=8,
        extra={"cp_pages": "dealt", "stages": "6"},
    )
    assert kv_of(topology) == Kv(6, 4) and grid_of(topology) == Grid(tp=2, cp=2, cp_pages="dealt", stages=(6,))
    rows = [
        Row(key=key, host="10.0.0.1", port=1000 + i, instance="i", extra={"end": f"end {key}"})
        for i, key in enumerate(topology.places())
    ]
    replica = replica_of(topology, rows, dp=1)
    assert [replica.ranks[r].port for r in range(4)] == [1004, 1005, 1006, 1007]
    assert replica.ranks[3].name == f"end {Coordinate(dp=1, cp=1, tp=1)}"
    with pytest.raises(ConfigError, match=r"4 ranks want an address, ranks \[3\] have none"):
        replica_of(topology, rows[:-1], dp=1)
    with pytest.raises(ConfigError, match="names no end"):
        replica_of(topology, [Row(key=Coordinate(), host="h", port=1, instance="i")])
    with pytest.raises(ConfigError, match="stages must read like 6,6,4, found 'six'"):
        grid_of(Topology(page_size=4, kv_dtype="x", layers=6, kv_heads=4, head_dim=8, extra={"stages": "six"}))
