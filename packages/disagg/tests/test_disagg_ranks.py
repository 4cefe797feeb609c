"""Rank maps over a large space of grids: everything a decode rank holds is written to it exactly once."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane.errors import ConfigError
from commplane_disagg.ranks import Grid, Kv, holding, notified_by, notifies, receives, sends

pytestmark = pytest.mark.timeout(60)

PAGES = 13


@st.composite
def grids(draw: st.DrawFn, kv: Kv) -> Grid:
    tps = [n for n in range(1, 17) if kv.kind == "mla" or kv.heads % n == 0 or n % kv.heads == 0]
    pps = list(range(1, kv.layers + 1))
    pp = draw(st.sampled_from(pps[:4]))
    stages: tuple[int, ...] = ()
    if pp > 1 and (kv.layers % pp or draw(st.booleans())):
        cuts = sorted(draw(st.sets(st.integers(1, kv.layers - 1), min_size=pp - 1, max_size=pp - 1)))
        stages = tuple(b - a for a, b in itertools.pairwise([0, *cuts, kv.layers]))
    return Grid(
        tp=draw(st.sampled_from(tps)),
        cp=draw(st.integers(1, 4)),
        pp=pp,
        cp_pages=draw(st.sampled_from(["all", "dealt"])),
        stages=stages,
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Kv, Grid, Grid]:
    kind = draw(st.sampled_from(["mha", "mla"]))
    kv = Kv(draw(st.integers(1, 9)), 1 if kind == "mla" else draw(st.sampled_from([1, 2, 3, 4, 6, 8])), kind)
    return kv, draw(grids(kv)), draw(grids(kv))


@given(pairs())
@settings(max_examples=250, deadline=None)
def test_every_layer_head_and_page_of_a_decode_rank_is_written_exactly_once_by_a_rank_that_holds_it(
    case: tuple[Kv, Grid, Grid],
) -> None:
    kv, prefill, decode = case
    for receiver in range(decode.size):
        written: Counter[tuple[int, int, int]] = Counter()
        for piece in receives(kv, prefill, decode, receiver):
            source = holding(kv, prefill, piece.sender)
            cells = list(itertools.product(range(*piece.layers), range(*piece.heads), filter(piece.has, range(PAGES))))
            for layer, head, position in cells:
                assert layer in range(*source.layers) and head in range(*source.heads)
                assert position % source.every == source.phase
            written.update(cells)
        held = holding(kv, decode, receiver)
        wanted = itertools.product(range(*held.layers), range(*held.heads), range(held.phase, PAGES, held.every))
        assert written == Counter(wanted)


@given(pairs())
@settings(max_examples=120, deadline=None)
def test_both_sides_expect_the_same_messages_and_no_prefill_rank_is_left_out(case: tuple[Kv, Grid, Grid]) -> None:
    kv, prefill, decode = case
    told = {(s, r) for r in range(decode.size) for s in notifies(kv, prefill, decode, r)}
    expected = {(s, r) for s in range(prefill.size) for r in notified_by(kv, prefill, decode, s)}
    assert told == expected
    assert {s for s, _ in told} == set(range(prefill.size))
    assert {r for _, r in told} == set(range(decode.size))
    from_receivers = {p for r in range(decode.size) for p in receives(kv, prefill, decode, r)}
    from_senders = {p for s in range(prefill.size) for p in sends(kv, prefill, decode, s)}
    assert from_receivers == from_senders


@pytest.mark.parametrize("kv", [Kv(4, 8), Kv(4, 2), Kv(4, 1, "mla")], ids=str)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_equal_grids_go_straight_across(kv: Kv, tp: int) -> None:
    grid = Grid(tp=tp, pp=2)
    for rank in range(grid.size):
        assert [(p.sender, p.heads) for p in receives(kv, grid, grid, rank)] == [(rank, holding(kv, grid, rank).heads)]


def test_replicated_heads_have_one_sender_each_and_receivers_are_spread_over_the_holders() -> None:
    kv, prefill, decode = Kv(2, 2), Grid(tp=8), Grid(tp=4)  # each head on 4 prefill ranks and on 2 decode ranks
    senders = [[p.sender for p in receives(kv, prefill, decode, r)] for r in range(4)]
    assert senders == [[0], [2], [4], [6]]
    dummies = [s for s in range(8) if not sends(kv, prefill, decode, s)]
    assert dummies == [1, 3, 5, 7]
    assert [notified_by(kv, prefill, decode, s) for s in dummies] == [(1,), (3,), (1,), (3,)]


def test_mla_has_one_sender_and_the_rest_are_dummies() -> None:
    kv, prefill = Kv(2, 1, "mla"), Grid(tp=4)
    assert [len(sends(kv, prefill, Grid(), s)) for s in range(4)] == [1, 0, 0, 0]
    assert [[p.receiver for p in sends(kv, prefill, Grid(tp=8), s)] for s in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_of_cp_ranks_with_the_same_pages_the_first_sends() -> None:
    kv, prefill = Kv(2, 2), Grid(tp=2, cp=3)
    assert [len(sends(kv, prefill, Grid(tp=2), s)) for s in range(6)] == [1, 1, 0, 0, 0, 0]
    dealt = Grid(tp=2, cp=3, cp_pages="dealt")
    assert [[(p.every, p.phase) for p in sends(kv, dealt, Grid(tp=2), s)] for s in range(6)] == [[(3, s // 2)] for s in range(6)]


@pytest.mark.parametrize(
    ("kv", "prefill", "decode", "numbers"),
    [
        (Kv(4, 4), Grid(tp=3), Grid(), "4 kv heads do not divide over tp 3"),
        (Kv(4, 4), Grid(), Grid(tp=6), "4 kv heads do not divide over tp 6"),
        (Kv(5, 4), Grid(pp=2), Grid(), "5 layers do not divide over pp 2"),
        (Kv(5, 4), Grid(), Grid(pp=2, stages=(2, 2)), "have 4 layers, the model has 5"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(kv: Kv, prefill: Grid, decode: Grid, numbers: str) -> None:
    with pytest.raises(ConfigError, match=numbers):
        for receiver in range(decode.size):
            receives(kv, prefill, decode, receiver)
    with pytest.raises(ConfigError, match=numbers):
        sends(kv, prefill, decode, 0)


def test_ranks_outside_of_a_grid_and_grids_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ConfigError, match="ranks 0 to 3, found 4"):
        receives(Kv(2, 2), Grid(), Grid(tp=2, pp=2), 4)
    with pytest.raises(ConfigError, match="at least 1 and give at most 65536 ranks, found 0"):
        Grid(tp=0)
    with pytest.raises(ConfigError, match="stages must give the layers of each of 2"):
        Grid(pp=2, stages=(1, 1, 1))
    with pytest.raises(ConfigError, match="one latent, so heads must be 1, found 8"):
        Kv(2, 8, "mla")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_coordinates_and_numbers_of_ranks_are_each_others_inverse(tp: int, cp: int, pp: int) -> None:
    grid = Grid(tp=tp, cp=cp, pp=pp)
    places = [grid.coordinates(rank) for rank in range(grid.size)]
    assert places == list(itertools.product(range(pp), range(cp), range(tp)))
    assert [grid.rank(pp=p, cp=c, tp=t) for p, c, t in places] == list(range(grid.size))
