"""Groups from sizes."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import ParallelLayout
from commplane.errors import ConfigError

pytestmark = pytest.mark.timeout(30)


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    def cut(n: int) -> int:
        return draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))

    tensor, pipeline = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24])), draw(st.integers(1, 4))
    data, moe_data = cut(tensor), cut(tensor)
    return ParallelLayout(
        world_size=tensor * pipeline,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=cut(tensor // data),
        expert=cut(tensor // moe_data),
        moe_data=moe_data,
    )


SIZES = {
    "world": lambda x: x.world_size,
    "tp": lambda x: x.tensor,
    "pp": lambda x: x.pipeline,
    "dp": lambda x: x.data,
    "attention_tp": lambda x: x.tensor // x.data // x.context,
    "attention_cp": lambda x: x.context,
    "attention": lambda x: x.tensor // x.data,
    "moe_tp": lambda x: x.tensor // x.expert // x.moe_data,
    "moe_ep": lambda x: x.expert,
    "moe_dp": lambda x: x.moe_data,
}


@given(layouts())
def test_every_family_cuts_the_world_into_groups_of_its_size(layout: ParallelLayout) -> None:
    assert tuple(SIZES) == ParallelLayout.families
    for family, size in SIZES.items():
        groups = layout.groups(family)
        assert groups == getattr(layout, family)
        assert sorted(r for g in groups for r in g) == list(range(layout.world_size))
        assert {len(g) for g in groups} == {size(layout)}
        assert all(list(g) == sorted(g) for g in groups) and list(groups) == sorted(groups)


@given(layouts())
def test_the_attention_group_is_a_grid_whose_rows_are_tp_and_whose_columns_are_cp(layout: ParallelLayout) -> None:
    width = layout.attention_tensor
    rows: set[tuple[int, ...]] = set()
    columns: set[tuple[int, ...]] = set()
    for grid in layout.attention:
        lines = [grid[i : i + width] for i in range(0, len(grid), width)]
        rows.update(lines)
        columns.update(zip(*lines, strict=True))
    assert rows == set(layout.attention_tp) and columns == set(layout.attention_cp)


@given(layouts())
def test_groups_are_those_of_sglangs_loops(layout: ParallelLayout) -> None:
    world, tp, pp, cp = layout.world_size, layout.tensor, layout.pipeline, layout.context
    atp, mtp, ep = layout.attention_tensor, layout.moe_tensor, layout.expert
    blocks = range(0, world, tp)
    assert list(layout.tp) == [tuple(range(b, b + tp)) for b in blocks]
    assert list(layout.pp) == [tuple(range(i, world, world // pp)) for i in range(world // pp)]
    assert list(layout.attention_tp) == [tuple(range(i, i + atp)) for i in range(0, world, atp)]
    columns = [tuple(range(b + i, b + i + atp * cp, atp)) for b in range(0, world, atp * cp) for i in range(atp)]
    assert list(layout.attention_cp) == columns
    assert list(layout.moe_tp) == [tuple(range(i, i + mtp)) for i in range(0, world, mtp)]
    assert list(layout.moe_ep) == [
        tuple(range(p + i, p + i + mtp * ep, mtp)) for p in range(0, world, mtp * ep) for i in range(mtp)
    ]
    assert list(layout.moe_dp) == [tuple(range(b + i, b + tp, mtp * ep)) for b in blocks for i in range(mtp * ep)]


@given(layouts())
def test_the_coordinates_of_a_rank_say_where_it_is(layout: ParallelLayout) -> None:
    for rank in range(layout.world_size):
        place = layout.of(rank)
        assert {f: g[place.index[f]] for f, g in place.groups.items()} == dict.fromkeys(ParallelLayout.families, rank)
        at = place.index
        assert at["attention"] == at["attention_cp"] * layout.attention_tensor + at["attention_tp"]
        assert at["tp"] == at["dp"] * len(place.groups["attention"]) + at["attention"]
        assert at["tp"] == (at["moe_dp"] * layout.expert + at["moe_ep"]) * layout.moe_tensor + at["moe_tp"]
        assert rank == at["pp"] * layout.tensor + at["tp"]


@given(layouts())
def test_ranks_that_share_groups_create_them_in_one_order(layout: ParallelLayout) -> None:
    order = layout.creation_order()
    assert len(set(order)) == len(order)
    mine = [[entry for entry in order if rank in entry[1]] for rank in range(layout.world_size)]
    for a, b in combinations(range(min(layout.world_size, 12)), 2):
        assert [e for e in mine[a] if b in e[1]] == [e for e in mine[b] if a in e[1]]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def enumerated(world: int, axes: dict[str, int]) -> dict[int, dict[str, int]]:
    """Coordinates as an engine hands them out: it counts ranks up through nested loops, the first axis outermost."""
    out, rank = {}, 0
    at = dict.fromkeys(axes, 0)
    while rank < world:
        out[rank] = dict(at)
        rank += 1
        for axis in reversed(axes):  # like the wheels of a counter
            at[axis] += 1
            if at[axis] < axes[axis]:
                break
            at[axis] = 0
    return out


def along(places: dict[int, dict[str, int]], *axes: str) -> set[tuple[int, ...]]:
    """Two ranks are in one group when they differ in nothing but `axes`."""
    apart = {r: tuple(n for axis, n in at.items() if axis not in axes) for r, at in places.items()}
    return {tuple(r for r in sorted(places) if apart[r] == rest) for rest in set(apart.values())}


def every_cut(most: int) -> list[tuple[int, int, int, int]]:
    """(pipeline, tensor, a, b) for all sizes up to `most` ranks, where a x b divides tensor."""
    return [
        (pp, tp, a, b)
        for tp in range(1, most + 1)
        for pp in range(1, most // tp + 1)
        for a in divisors(tp)
        for b in divisors(tp // a)
    ]


def test_every_layout_of_up_to_64_ranks_has_the_groups_of_an_enumeration() -> None:
    cuts = every_cut(64)
    assert len(cuts) > 1500
    for pp, tp, a, b in cuts:
        rest = tp // a // b
        layout = ParallelLayout(world_size=pp * tp, tensor=tp, pipeline=pp, data=a, context=b, moe_data=a, expert=b)
        attention = enumerated(pp * tp, {"pp": pp, "dp": a, "cp": b, "tp": rest})
        moe = enumerated(pp * tp, {"pp": pp, "dp": a, "ep": b, "tp": rest})
        wanted = {
            "world": along(attention, "pp", "dp", "cp", "tp"),
            "tp": along(attention, "dp", "cp", "tp"),
            "pp": along(attention, "pp"),
            "dp": along(attention, "dp"),
            "attention_dp": along(attention, "dp"),
            "attention_tp": along(attention, "tp"),
            "attention_cp": along(attention, "cp"),
            "cp": along(attention, "cp"),
            "attention": along(attention, "cp", "tp"),
            "moe_tp": along(moe, "tp"),
            "moe_ep": along(moe, "ep"),
            "ep": along(moe, "ep"),
            "moe_dp": along(moe, "dp"),
        }
        assert {f: set(layout.groups(f)) for f in wanted} == wanted, layout


@given(layouts())
def test_the_text_has_every_family_with_its_number_of_groups_and_ranks(layout: ParallelLayout) -> None:
    lines = layout.explain().splitlines()[1:]
    found = dict(line.split(":")[0].split(maxsplit=1) for line in lines)
    assert found == {f: f"{len(layout.groups(f))} x {len(layout.groups(f)[0])}" for f in ParallelLayout.families}


def test_the_text_shows_ranks_at_equal_distances_as_a_stretch() -> None:
    text = ParallelLayout(world_size=64, tensor=32, pipeline=2, data=2, context=2, expert=16).explain()
    assert text.startswith("layout: world_size 64, tensor 32, pipeline 2, data 2, context 2, expert 16\n")
    assert "  moe_ep        4 x 16: [0-30:2] [1-31:2] [32-62:2] [33-63:2]\n" in text
    assert "  dp            32 x 2: [0 16] [1 17] [2 18] [3 19] [4 20] [5 21] [6 22] [7 23] and 24 more\n" in text


def test_the_drawing_of_the_module_is_right() -> None:
    layout = ParallelLayout(world_size=8, tensor=8, data=2, context=2, expert=4)
    assert layout.attention_tp == layout.moe_tp == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.attention_cp == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.attention == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert layout.dp == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.moe_ep == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert layout.moe_dp == tuple((r,) for r in range(8)) and layout.tp == (tuple(range(8)),)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"world_size": 8, "tensor": 4}, "found 1 x 4 = 4 and 8 ranks"),
        ({"world_size": 8, "tensor": 4, "pipeline": 3}, "found 3 x 4 = 12 and 8 ranks"),
        (
            {"world_size": 8, "tensor": 8, "data": 2, "context": 3},
            "data x context must divide tensor, found 2 x 3 = 6 and tensor 8",
        ),
        ({"world_size": 8, "tensor": 8, "expert": 3}, "moe_data x expert must divide tensor, found 1 x 3 = 3 and tensor 8"),
        ({"world_size": 8, "tensor": 8, "context": 0}, "context must be a positive integer, found 0"),
        ({"world_size": 8, "tensor": 8.0}, "tensor must be a positive integer, found 8.0"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ParallelLayout(**sizes)


def test_a_rank_or_a_family_that_is_not_there_is_refused() -> None:
    layout = ParallelLayout(world_size=2, tensor=2)
    with pytest.raises(ConfigError, match="a rank below 2, found 2"):
        layout.of(2)
    with pytest.raises(ConfigError, match=r"wanted one of world, tp, pp, .* found 'tpp'"):
        layout.groups("tpp")


def test_a_layout_loads_no_torch() -> None:
    use = "from commplane.api import ParallelLayout\nParallelLayout(world_size=4, tensor=4).of(1)"
    run = subprocess.run([sys.executable, "-c", f"import sys\n{use}\nassert 'torch' not in sys.modules"], check=False)
    assert run.returncode == 0
