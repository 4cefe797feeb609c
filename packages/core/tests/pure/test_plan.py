"""Ranges of sizes, and the plan that holds them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import BackendSpec, Collective, GroupKey, Numerics, QuantFormat, ReduceOp, Variant
from commplane.errors import UnsupportedOperation
from commplane.select import Candidate, Plan, Route, compile_routes

DTYPES = ["float32", "bfloat16", "int8"]
# Barriers have no size; they have their own test.
SIZED = [c for c in Collective if c is not Collective.BARRIER]
NORMS = (Collective.ALL_REDUCE_RMS_NORM, Collective.ALL_REDUCE_RMS_NORM_QUANT)
KEY = GroupKey((4, 6), "cpu", "tp")


def backend(name: str = "mine", **changes: Any) -> BackendSpec:
    values: dict[str, Any] = {"name": name, "api": (1, 0), "factory": "m:C", "probe": "m:p", "device": "cpu"}
    return BackendSpec(**(values | {"capabilities": {"all_reduce"}, "dtypes": {"float32"}} | changes))


@st.composite
def backends(draw: st.DrawFn) -> list[BackendSpec]:
    out = []
    for name in ["a", "b", "c", "d"][: draw(st.integers(0, 4))]:
        low = draw(st.integers(0, 12))
        capabilities = draw(st.sets(st.sampled_from(SIZED), min_size=1))
        quantizes = Collective.ALL_REDUCE_RMS_NORM_QUANT in capabilities
        out.append(
            backend(
                name,
                capabilities=capabilities,
                formats=draw(st.sets(st.sampled_from(list(QuantFormat)), min_size=1)) if quantizes else (),
                dtypes=draw(st.sets(st.sampled_from(DTYPES[:2]))),  # empty: every dtype; int8 is named by nobody
                ops=draw(st.sets(st.sampled_from(list(ReduceOp)), min_size=1)),
                min_bytes=low,
                max_bytes=draw(st.one_of(st.none(), st.integers(low, 14))),
                numerics=draw(st.sampled_from(list(Numerics))),
            )
        )
    return out


def plan_of(specs: list[BackendSpec], numerics: str = "any", *refused: Candidate) -> Plan:
    ready = tuple(Candidate(s.name, f"{s.name}-dist 1.0", "ready") for s in specs)
    return Plan(KEY, (*ready, *refused), compile_routes(specs, numerics), tuple(specs), numerics)


def questions() -> list[tuple[Collective, Variant | None]]:
    return [(c, op) for c in SIZED for op in c.variants]


def adds(collective: Collective) -> bool:
    return collective in (Collective.ALL_REDUCE, Collective.REDUCE_SCATTER, *NORMS)


def covers(spec: BackendSpec, collective: Collective, op: Variant | None, dtype: str, nbytes: int, numerics: str = "any") -> bool:
    """The meaning of a spec, written anew."""
    return (
        str(collective) in {str(c) for c in spec.capabilities}
        and (op is None or op in spec.ops or op in spec.formats)
        and (not adds(collective) or numerics == "any" or spec.numerics is Numerics.RANK_ORDER)
        and (collective not in NORMS or dtype != "int8")
        and (not spec.dtypes or dtype in spec.dtypes)
        and spec.min_bytes <= nbytes
        and (spec.max_bytes is None or nbytes <= spec.max_bytes)
    )


@given(backends(), st.sampled_from(["any", "rank_order"]))
def test_each_size_goes_to_the_first_backend_that_covers_it(specs: list[BackendSpec], numerics: str) -> None:
    plan = plan_of(specs, numerics)
    for collective, op in questions():
        for dtype in DTYPES:
            routes = plan.find(collective, op, dtype)
            for nbytes in range(18):
                hits = [r.backend for r in routes if r.low <= nbytes and (r.high is None or nbytes < r.high)]
                wanted = [s.name for s in specs if covers(s, collective, op, dtype, nbytes, numerics)]
                assert hits == wanted[:1]


@given(backends(), st.sampled_from(["any", "rank_order"]))
def test_ranges_are_disjoint_sorted_and_not_empty(specs: list[BackendSpec], numerics: str) -> None:
    plan = plan_of(specs, numerics)
    for collective, op in questions():
        for dtype in DTYPES:
            routes = plan.find(collective, op, dtype)
            assert all(r.low >= 0 and (r.high is None or r.low < r.high) for r in routes)
            for one, other in pairwise(routes):
                assert one.high is not None and one.high <= other.low


@given(backends())
def test_compiling_twice_gives_the_same_routes(specs: list[BackendSpec]) -> None:
    assert compile_routes(specs) == compile_routes(list(specs))


@given(backends(), st.sampled_from(["any", "rank_order"]), st.integers(0, 16))
def test_explain_names_the_backend_that_the_routes_give_and_a_reason_for_every_other(
    specs: list[BackendSpec], numerics: str, nbytes: int
) -> None:
    refused = Candidate("z", "z-dist 1.0", "canary", "wrong sum")
    plan = plan_of(specs, numerics, refused)
    for collective, op in questions():
        answer = plan.explain(str(collective), nbytes=nbytes, dtype="float32", op=str(op or "sum"))
        wanted = [s.name for s in specs if covers(s, collective, op, "float32", nbytes, numerics)]
        chosen = wanted[0] if wanted else None
        parts = [(Collective.ALL_REDUCE_RMS_NORM, None)] if collective is Collective.ALL_REDUCE_RMS_NORM_QUANT else []
        for part, variant in [*parts, (Collective.ALL_REDUCE, ReduceOp.SUM)] if collective in NORMS else []:
            have = [s.name for s in specs if covers(s, part, variant, "float32", nbytes, numerics)]
            if chosen is None and have:
                chosen = f"composed of {part} by {have[0]} and torch"
        assert answer.chosen == chosen
        others = dict(answer.others)
        assert sorted([*others, *wanted[:1]]) == sorted(["z", *(s.name for s in specs)])
        assert others["z"] == "canary: wrong sum"
        for name, reason in others.items():
            assert (reason == f"{answer.chosen} comes before it") is (name in wanted)


def ranges(specs: list[BackendSpec], numerics: str = "any") -> list[tuple[int, int | None, str]]:
    found = plan_of(specs, numerics).find(Collective.ALL_REDUCE, ReduceOp.SUM, "float32")
    return [(r.low, r.high, r.backend) for r in found]


def test_both_byte_limits_are_inclusive() -> None:
    assert ranges([backend(min_bytes=10, max_bytes=20)]) == [(10, 21, "mine")]


def test_one_size_is_a_range_of_its_own() -> None:
    assert ranges([backend(min_bytes=0, max_bytes=0), backend("torch")]) == [(0, 1, "mine"), (1, None, "torch")]


def test_a_preferred_backend_for_middle_sizes_leaves_a_hole_that_the_next_one_fills_on_both_sides() -> None:
    specs = [backend("middle", min_bytes=100, max_bytes=199), backend("torch")]
    assert ranges(specs) == [(0, 100, "torch"), (100, 200, "middle"), (200, None, "torch")]


def test_a_preferred_backend_for_small_and_large_sizes_gives_a_range_to_each() -> None:
    specs = [backend("middle", min_bytes=100, max_bytes=199), backend("wide", max_bytes=999), backend("torch")]
    assert ranges(specs) == [(0, 100, "wide"), (100, 200, "middle"), (200, 1000, "wide"), (1000, None, "torch")]


def test_sizes_that_nobody_covers_are_in_no_range() -> None:
    assert ranges([backend("small", max_bytes=9), backend("large", min_bytes=20)]) == [
        (0, 10, "small"),
        (20, None, "large"),
    ]


def test_rank_order_leaves_out_backends_that_reduce_in_any_order() -> None:
    specs = [backend("fast"), backend("exact", numerics="rank_order")]
    assert ranges(specs) == [(0, None, "fast")]
    assert ranges(specs, "rank_order") == [(0, None, "exact")]


def test_rank_order_does_not_bear_on_collectives_that_add_nothing() -> None:
    plan = plan_of([backend(capabilities={"all_gather", "reduce_scatter"})], "rank_order")
    assert [r.backend for r in plan.find(Collective.ALL_GATHER, None, "float32")] == ["mine"]
    assert plan.find(Collective.REDUCE_SCATTER, ReduceOp.SUM, "float32") == []


def test_a_dtype_that_nobody_names_goes_to_a_backend_for_every_dtype() -> None:
    plan = plan_of([backend(), backend("every", dtypes=())])
    assert [r.backend for r in plan.find(Collective.ALL_REDUCE, ReduceOp.SUM, "float32")] == ["mine"]
    assert [r.backend for r in plan.find(Collective.ALL_REDUCE, ReduceOp.SUM, "complex64")] == ["every"]


def test_a_barrier_has_no_size_and_so_one_route() -> None:
    plan = plan_of([backend(capabilities={"barrier"}, max_bytes=100), backend("torch", capabilities={"barrier"})])
    routes = plan.find(Collective.BARRIER, None, "None")
    assert [(r.low, r.high, r.backend) for r in routes] == [(0, None, "mine")]


# What a plan says.

REASONS: list[tuple[dict[str, Any], str]] = [
    ({"capabilities": {"broadcast"}}, "does not declare all_reduce"),
    ({"ops": {"max", "min"}}, "serves op max, min, not sum"),
    ({"dtypes": {"int8", "float16"}}, "serves float16, int8, not float32"),
    ({"min_bytes": 101}, "is for messages from 101 bytes"),
    ({"max_bytes": 99}, "is for messages up to 99 bytes"),
    ({}, "torch comes before it"),
]


@pytest.mark.parametrize(("changes", "reason"), REASONS, ids=[r for _, r in REASONS])
def test_explain_gives_the_declared_limit_that_a_call_is_outside_of(changes: dict[str, Any], reason: str) -> None:
    answer = plan_of([backend("torch"), backend(**changes)]).explain(nbytes=100)
    assert (answer.chosen, answer.others) == ("torch", (("mine", reason),))


@pytest.mark.parametrize("limits", [{"min_bytes": 100}, {"max_bytes": 100}])
def test_explain_does_not_hold_a_size_on_the_limit_against_a_backend(limits: dict[str, Any]) -> None:
    answer = plan_of([backend("torch"), backend(**limits)]).explain(nbytes=100)
    assert answer.others == (("mine", "torch comes before it"),)


def test_explain_says_what_the_numerics_class_rules_out() -> None:
    answer = plan_of([backend(), backend("exact", numerics="rank_order")], "rank_order").explain(nbytes=100)
    reason = "does not add in rank order, which the setting numerics=rank_order demands"
    assert (answer.chosen, answer.others) == ("exact", (("mine", reason),))


@pytest.mark.parametrize("state", ["probe", "policy", "build", "canary"])
def test_explain_shows_at_which_step_a_backend_was_left_out_and_why(state: str) -> None:
    plan = plan_of([backend("torch")], "any", Candidate("mine", "mine-dist 1.0", state, "because"))
    assert plan.explain().others == (("mine", f"{state}: because"),)


def test_explain_as_text_and_as_json_say_the_same() -> None:
    plan = plan_of([backend(max_bytes=99), backend("torch")], "any", Candidate("gone", "d 1", "probe", "spans hosts"))
    answer = plan.explain("all_reduce", nbytes=100, dtype="float32", op="sum")
    question = "all_reduce(sum, float32, 100 bytes) in 'tp' over [4, 6] on cpu"
    assert str(answer).splitlines() == [
        f"{question}: torch",
        "  not mine: is for messages up to 99 bytes",
        "  not gone: probe: spans hosts",
    ]
    assert answer.to_json() == {
        "question": question,
        "chosen": "torch",
        "algorithm": None,
        "bytes": None,
        "others": {"mine": "is for messages up to 99 bytes", "gone": "probe: spans hosts"},
    }


def test_explain_of_a_call_that_nobody_serves_says_so() -> None:
    answer = plan_of([backend()]).explain(dtype="int8")
    assert answer.chosen is None
    assert str(answer).splitlines()[0].endswith(": nothing in the plan serves this")


def test_explain_takes_a_torch_dtype_and_leaves_out_the_op_of_what_does_not_reduce() -> None:
    torch = pytest.importorskip("torch", reason="the dtype of a torch that is not installed here")
    answer = plan_of([backend(capabilities={"broadcast"})]).explain("broadcast", nbytes=8, dtype=torch.float32)
    assert (answer.chosen, answer.question.partition(" in ")[0]) == ("mine", "broadcast(float32, 8 bytes)")


def test_the_backends_of_a_plan_are_those_that_are_ready_in_their_order() -> None:
    plan = plan_of([backend("b"), backend("a")], "any", Candidate("c", "d 1", "build", "no"))
    assert plan.backends == ("b", "a")


def test_the_text_of_a_plan_shows_every_candidate_and_every_range() -> None:
    text = str(plan_of([backend(max_bytes=99), backend("torch")], "any", Candidate("gone", "d 1", "probe", "spans hosts")))
    assert "left out at probe: spans hosts" in text
    assert "0 <= bytes < 100" in text and "100 <= bytes < inf" in text


BASE = plan_of([backend(), backend("torch")])


@pytest.mark.parametrize(
    "other",
    [
        replace(BASE, key=GroupKey((6, 4), "cpu", "tp")),
        replace(BASE, key=GroupKey((4, 6), "cuda", "tp")),
        replace(BASE, key=GroupKey((4, 6), "cpu", "pp")),
        replace(BASE, candidates=BASE.candidates[::-1]),
        replace(BASE, candidates=(replace(BASE.candidates[0], dist="mine-dist 1.1"), *BASE.candidates[1:])),
        replace(BASE, candidates=(*BASE.candidates, Candidate("x", "d 1", "probe", "no"))),
        replace(BASE, candidates=(replace(BASE.candidates[0], reason="because"), *BASE.candidates[1:])),
        replace(BASE, routes=BASE.routes[:-1]),
        replace(BASE, routes=(replace(BASE.routes[0], low=1), *BASE.routes[1:])),
        replace(BASE, routes=(replace(BASE.routes[0], high=1), *BASE.routes[1:])),
        replace(BASE, routes=(replace(BASE.routes[0], backend="torch"), *BASE.routes[1:])),
        replace(BASE, routes=(replace(BASE.routes[0], op=ReduceOp.MAX), *BASE.routes[1:])),
        replace(BASE, routes=(replace(BASE.routes[0], dtype="int8"), *BASE.routes[1:])),
        replace(BASE, routes=(replace(BASE.routes[0], collective=Collective.BARRIER), *BASE.routes[1:])),
        replace(BASE, specs=BASE.specs[::-1]),
        replace(BASE, specs=(backend(priority=7), *BASE.specs[1:])),
        replace(BASE, numerics="rank_order"),
    ],
    ids=[
        "rank order", "device", "purpose", "candidate order", "dist", "another candidate", "reason", "route gone",
        "low", "high", "route backend", "route op", "route dtype", "route collective", "spec order", "spec", "numerics",
    ],
)  # fmt: skip
def test_the_digest_changes_with_everything_a_plan_holds(other: Plan) -> None:
    assert other.digest != BASE.digest


def test_equal_plans_have_one_digest() -> None:
    assert plan_of([backend(), backend("torch")]).digest == BASE.digest


# The error for a call that nothing serves.


def test_an_unsupported_dtype_is_refused_with_the_reason_of_each_backend() -> None:
    plan = plan_of([backend("a", dtypes={"float16"}), backend("b", dtypes={"float32", "bfloat16"})])
    error = plan.unsupported("[tp rank 0/2]", Collective.ALL_REDUCE, "sum", "complex64")
    assert isinstance(error, UnsupportedOperation)
    assert str(error) == (
        "[tp rank 0/2] all_reduce of complex64 with op sum is served by no backend of this group "
        "(a: serves float16, not complex64; b: serves bfloat16, float32, not complex64): "
        "convert the tensor, or install a backend that serves it"
    )


def test_an_unknown_op_is_refused_with_those_there_are() -> None:
    error = plan_of([backend()]).unsupported("[tp rank 0/2]", Collective.ALL_REDUCE, "prod", "float32")
    assert str(error) == "[tp rank 0/2] all_reduce: wanted op sum, min, max, avg, found 'prod'"


def test_an_unsupported_collective_is_refused_without_an_op() -> None:
    error = plan_of([backend()]).unsupported("[tp rank 0/2]", Collective.BROADCAST, None, "float32")
    assert "broadcast of float32 is served by no backend of this group (mine: does not declare broadcast)" in str(error)


def test_a_route_is_a_value() -> None:
    route = Route(Collective.BARRIER, None, "*", 0, None, "mine")
    assert route == replace(route) and hash(route) == hash(replace(route))
