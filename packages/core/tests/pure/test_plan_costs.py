"""Routes that follow timings: at each size the fastest candidate that covers it; without timings the order of the plan."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import BackendSpec, Collective, GroupKey, QuantFormat, ReduceOp
from commplane.select import Candidate, Curve, Plan, Timings

KEY = GroupKey((0, 1), "cpu", "tp")
NORM = Collective.ALL_REDUCE_RMS_NORM
QUANT = Collective.ALL_REDUCE_RMS_NORM_QUANT


def backend(name: str, *capabilities: str, **changes: Any) -> BackendSpec:
    values: dict[str, Any] = {"name": name, "api": (1, 3), "factory": "m:C", "probe": "m:p", "device": "cpu"}
    return BackendSpec(**(values | {"capabilities": set(capabilities), "dtypes": {"bfloat16"}} | changes))


FLASH = backend("flashinfer", "all_reduce_rms_norm")
CUSTOM = backend("custom_ar", "all_reduce", "all_reduce_rms_norm")
TORCH = backend("torch", "all_reduce")


def curve(candidate: str, *points: tuple[int, float], collective: str = str(NORM), **changes: Any) -> Curve:
    values: dict[str, Any] = {"variant": None, "dtype": "bfloat16", "graph": False} | changes
    return Curve(collective, candidate=candidate, points=points, **values)


def plan_of(specs: list[BackendSpec], *curves: Curve) -> Plan:
    ready = [Candidate(s.name, f"{s.name}-dist 1.0", "ready") for s in specs]
    return Plan.of(KEY, ready, specs, timings=Timings(curves) if curves else None)


def routes(plan: Plan, collective: Collective = NORM, op: Any = None) -> list[tuple[int, int | None, str]]:
    return [(r.low, r.high, r.candidate) for r in plan.serving(collective, op, "bfloat16")]


M = 1 << 20
MEASURED = (
    curve("flashinfer", (8192, 6.0), (16 * M, 84.7)),
    curve("custom_ar", (8192, 7.0), (16 * M, 90.0)),
    curve("composed:custom_ar", (8192, 12.0), (16 * M, 81.8)),
)


def test_a_pair_wins_from_where_it_is_faster() -> None:
    (low, high, first), (start, end, second) = routes(plan_of([FLASH, CUSTOM, TORCH], *MEASURED))
    assert (low, first, end, second) == (0, "flashinfer", None, "composed:custom_ar")
    assert high is not None and high == start and 8192 < start < 16 * M
    fused, pair = MEASURED[0], MEASURED[2]
    assert pair.at(start) <= fused.at(start) and pair.at(start - 1) > fused.at(start - 1)


def test_explain_shows_the_times_of_the_chosen_and_of_the_others() -> None:
    answer = plan_of([FLASH, CUSTOM, TORCH], *MEASURED).explain(str(NORM), nbytes=16 * M, dtype="bfloat16")
    assert str(answer).splitlines() == [
        "all_reduce_rms_norm(bfloat16, 16777216 bytes) in 'tp' over [0, 1] on cpu: "
        "composed of all_reduce by custom_ar and torch, 81.8 us",
        "  not flashinfer (fused): 84.7 us at 16777216 bytes, the pair of custom_ar and torch takes 81.8",
        "  not custom_ar (fused): 90.0 us at 16777216 bytes, the pair of custom_ar and torch takes 81.8",
        "  not torch: does not declare all_reduce_rms_norm",
    ]
    assert answer.to_json()["microseconds"] == 81.8


def test_without_timings_a_fused_one_comes_first() -> None:
    assert routes(plan_of([FLASH, CUSTOM, TORCH])) == [(0, None, "flashinfer")]


def test_a_plain_all_reduce_follows_its_timings_and_so_does_what_is_composed_of_it() -> None:
    measured = [
        curve(name, (1024, small), (65536, large), collective="all_reduce", variant="sum")
        for name, small, large in (("custom_ar", 9.0, 9.0), ("torch", 3.0, 90.0))
    ]
    plan = plan_of([backend("custom_ar", "all_reduce"), TORCH], *measured)
    (_, cut, one), (_, _, other) = routes(plan, Collective.ALL_REDUCE, ReduceOp.SUM)
    assert (one, other) == ("torch", "custom_ar")
    assert routes(plan) == [(0, cut, "composed:torch"), (cut, None, "composed:custom_ar")]
    assert routes(plan, QUANT, QuantFormat.FP8_TOKEN) == routes(plan)


def test_a_failed_candidate_runs_at_no_size() -> None:
    failed = curve("flashinfer", failed="rank 1: gave the residual wrong")
    plan = plan_of([FLASH, TORCH], failed)
    assert routes(plan) == [(0, None, "composed:torch")]
    answer = plan.explain(str(NORM), nbytes=64, dtype="bfloat16")
    assert dict(answer.others)["flashinfer (fused)"] == "failed when it was tuned: rank 1: gave the residual wrong"


def test_a_way_that_failed_from_a_size_on_runs_below_it() -> None:
    plan = plan_of([FLASH, TORCH], curve("flashinfer", (1024, 1.0), failed="rank 1: no memory", failed_from=4096))
    assert routes(plan) == [(0, 4096, "flashinfer"), (4096, None, "composed:torch")]
    assert "failed when it was tuned" in str(plan.explain(str(NORM), nbytes=4096, dtype="bfloat16"))
    assert "failed when it was tuned" not in str(plan.explain(str(NORM), nbytes=4095, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("collective", "variant", "candidate", "gone"),
    [
        ("all_reduce", "sum", "custom_ar", {"composed:custom_ar"}),
        (str(NORM), None, "custom_ar", {"custom_ar", "composed_norm:custom_ar"}),
        (str(NORM), None, "composed:custom_ar", {"composed:custom_ar"}),
    ],
)
def test_what_was_wrong_in_a_call_is_not_used_for_what_is_composed_of_it(
    collective: str, variant: str | None, candidate: str, gone: set[str]
) -> None:
    """Of each call that is composed, the ways are tried one by one: whichever comes first is taken away until none is left."""
    wrong = curve(candidate, collective=collective, variant=variant, failed="rank 0: wrong")
    for call, op in ((NORM, None), (QUANT, QuantFormat.FP8_TOKEN)):
        ways = set(plan_of([CUSTOM, TORCH]).ways(call, op, "bfloat16"))
        left = set()
        specs = [CUSTOM, TORCH]
        found: list[Curve] = [wrong]
        while chosen := {label for _, _, label in routes(plan_of(specs, *found), call, op)}:
            left |= chosen
            key = {"collective": str(call), "variant": op and str(op)}
            known = {c.candidate for c in found if c.collective == key["collective"]}
            assert not chosen & known
            found += [curve(label, **key, failed="taken away") for label in chosen - known]
        assert ways - left == ways & gone


def test_the_first_by_preference_keeps_its_place_where_others_were_measured_and_it_was_not() -> None:
    plan = plan_of([FLASH, CUSTOM, TORCH], *MEASURED[1:])
    assert routes(plan) == [(0, None, "flashinfer")]
    reason = dict(plan.explain(str(NORM), nbytes=8192, dtype="bfloat16").others)["custom_ar (fused)"]
    assert reason == "7.0 us at 8192 bytes, flashinfer comes before it and was not measured"


def test_explain_says_of_one_that_comes_later_that_it_is_the_one_that_was_not_measured() -> None:
    plan = plan_of([CUSTOM, FLASH, TORCH], curve("custom_ar", (8192, 7.0)), curve("composed:torch", (8192, 9.0)))
    answer = plan.explain(str(NORM), nbytes=8192, dtype="bfloat16")
    assert answer.chosen == "custom_ar"
    assert dict(answer.others)["flashinfer"] == "was not measured, and custom_ar comes before it"


def test_explain_says_of_which_hidden_size_and_where_from_the_times_are() -> None:
    there = curve("flashinfer", (8192, 6.0), hidden=4096, source="a file")
    assert "flashinfer, 6.0 us (hidden 4096, a file)" in str(plan_of([FLASH, TORCH], there).explain(str(NORM), dtype="bfloat16"))


def test_limits_of_a_spec_bound_what_was_measured() -> None:
    short = backend("flashinfer", "all_reduce_rms_norm", max_bytes=4095)
    plan = plan_of(
        [short, TORCH], curve("flashinfer", (1024, 1.0), (8192, 1.0)), curve("composed:torch", (1024, 5.0), (8192, 5.0))
    )
    assert routes(plan) == [(0, 4096, "flashinfer"), (4096, None, "composed:torch")]


def test_a_candidate_measured_at_small_sizes_only_says_nothing_of_large_ones() -> None:
    plan = plan_of([FLASH, TORCH], curve("flashinfer", (1024, 1.0)), curve("composed:torch", (1024, 5.0), (M, 50.0)))
    assert routes(plan) == [(0, 1025, "flashinfer"), (1025, None, "composed:torch")]


def test_the_digest_covers_timings() -> None:
    plan = plan_of([FLASH, TORCH])
    tuned = plan.tuned(Timings((curve("flashinfer", (1024, 1.0)),)))
    assert tuned.digest != plan.digest != tuned.tuned(Timings((curve("flashinfer", (1024, 2.0)),))).digest
    assert tuned.tuned(None).digest == plan.digest


NAMES = ["flashinfer", "custom_ar", "composed:custom_ar", "composed:torch"]
POINTS = st.lists(st.integers(0, 40), min_size=1, max_size=6, unique=True)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[BackendSpec], list[Curve]]:
    specs = []
    for name, *capabilities in (("flashinfer", "all_reduce_rms_norm"), ("custom_ar", "all_reduce", "all_reduce_rms_norm")):
        low = draw(st.integers(0, 20))
        specs.append(backend(name, *capabilities, min_bytes=low, max_bytes=draw(st.one_of(st.none(), st.integers(low, 40)))))
    curves = []
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True)):
        sizes = sorted(draw(POINTS))
        curves.append(curve(name, *((n, float(draw(st.integers(1, 9)))) for n in sizes)))
    return [*specs, TORCH], curves


@given(tables())
def test_every_size_has_one_route_the_best_measured_one_unless_the_first_by_preference_was_not_measured(
    table: tuple[list[BackendSpec], list[Curve]],
) -> None:
    specs, curves = table
    plan = plan_of(specs, *curves)
    found = plan.serving(NORM, None, "bfloat16")
    assert found[0].low == 0 and found[-1].high is None
    assert all(one.high == other.low for one, other in pairwise(found))
    ways = plan.ways(NORM, None, "bfloat16")
    for n in {n for c in curves for n, _ in c.points}:
        chosen = next(r.candidate for r in found if r.serves(n))
        times = {
            c.candidate: dict(c.points)[n] for c in curves if n in dict(c.points) and any(r.serves(n) for r in ways[c.candidate])
        }
        first = next(label for label, of_it in ways.items() if any(r.serves(n) for r in of_it))
        if first not in {c.candidate for c in curves}:
            assert chosen == first
        elif times:
            mine = next(c for c in curves if c.candidate == chosen)
            assert mine.at(n) <= min(times.values()) + 1e-9
        assert any(r.serves(n) for r in ways[chosen])


@given(tables(), st.randoms())
def test_the_order_in_which_curves_are_given_changes_nothing(table: tuple[list[BackendSpec], list[Curve]], random: Any) -> None:
    specs, curves = table
    shuffled = list(curves)
    random.shuffle(shuffled)
    assert plan_of(specs, *curves).digest == plan_of(specs, *shuffled).digest


@given(tables())
def test_timings_survive_json(table: tuple[list[BackendSpec], list[Curve]]) -> None:
    timings = Timings(tuple(table[1]))
    assert Timings.from_json(json.loads(json.dumps(timings.to_json()))) == timings


@pytest.mark.parametrize(
    "change", [{"points": [[8, -1.0]]}, {"points": [[9, 1.0], [8, 1.0]]}, {"points": []}, {"collective": "dance"}, {"graph": 1}]
)
def test_what_is_no_curve_is_refused(change: dict[str, Any]) -> None:
    good = curve("torch", (8, 1.0)).to_json()
    assert Curve.from_json(good) == curve("torch", (8, 1.0))
    with pytest.raises(ValueError, match="want"):
        Curve.from_json(good | change)
