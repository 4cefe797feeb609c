"""`all_reduce_rms_norm` in a plan: whole where a backend has it, composed where one can all-reduce, refused elsewhere."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import BackendSpec, Collective, GroupKey, ReduceOp
from commplane.cli import doctor
from commplane.select import Candidate, Plan, compile_routes

NORM = Collective.ALL_REDUCE_RMS_NORM
KEY = GroupKey((0, 1), "cpu", "tp")


def backend(name: str, *capabilities: str, **changes: Any) -> BackendSpec:
    values: dict[str, Any] = {"name": name, "api": (1, 1), "factory": "m:C", "probe": "m:p", "device": "cpu"}
    return BackendSpec(**(values | {"capabilities": set(capabilities), "dtypes": {"float32", "bfloat16", "int8"}} | changes))


FUSED = backend("fused", "all_reduce_rms_norm", min_bytes=100, max_bytes=199)
PLAIN = backend("torch", "all_reduce")


def plan_of(*specs: BackendSpec, numerics: str = "any") -> Plan:
    ready = tuple(Candidate(s.name, f"{s.name}-dist 1.0", "ready") for s in specs)
    return Plan(KEY, ready, compile_routes(specs, numerics), specs, numerics)


def composed(plan: Plan, dtype: str = "float32") -> list[tuple[int, int | None, str]]:
    routes = plan.composed(NORM, None, dtype)
    assert all((r.collective, r.op) == (Collective.ALL_REDUCE, ReduceOp.SUM) for r in routes)
    return [(r.low, r.high, r.backend) for r in routes]


def test_it_takes_no_op_but_combines_what_the_ranks_have() -> None:
    assert not NORM.reduces and NORM.combines
    assert [c for c in Collective if c.combines] == [
        Collective.ALL_REDUCE,
        Collective.REDUCE_SCATTER,
        NORM,
        Collective.ALL_REDUCE_RMS_NORM_QUANT,
    ]


def test_where_no_backend_has_it_it_is_composed_at_every_size() -> None:
    plan = plan_of(PLAIN)
    assert plan.find(NORM, None, "float32") == []
    assert composed(plan) == [(0, None, "torch")]


def test_a_backend_for_some_sizes_leaves_the_others_composed() -> None:
    plan = plan_of(FUSED, PLAIN)
    assert [(r.low, r.high, r.backend) for r in plan.find(NORM, None, "float32")] == [(100, 200, "fused")]
    assert composed(plan) == [(0, 100, "torch"), (200, None, "torch")]


def test_a_backend_for_all_sizes_leaves_nothing_composed() -> None:
    assert composed(plan_of(backend("fused", "all_reduce_rms_norm"), PLAIN)) == []


def test_each_composed_size_has_the_all_reduce_of_its_own_route() -> None:
    small = backend("small", "all_reduce", max_bytes=149)
    assert composed(plan_of(FUSED, small, PLAIN)) == [(0, 100, "small"), (200, None, "torch")]
    assert composed(plan_of(small, PLAIN)) == [(0, 150, "small"), (150, None, "torch")]


def test_sizes_that_nothing_can_all_reduce_are_not_composed() -> None:
    assert composed(plan_of(FUSED, backend("small", "all_reduce", max_bytes=49))) == [(0, 50, "small")]
    assert composed(plan_of(FUSED)) == []


def test_a_backend_that_only_reduces_otherwise_composes_nothing() -> None:
    assert composed(plan_of(backend("max", "all_reduce", ops={"max"}))) == []


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "complex64"])
def test_dtypes_without_a_norm_are_neither_routed_nor_composed(dtype: str) -> None:
    plan = plan_of(backend("every", "all_reduce", "all_reduce_rms_norm", dtypes=()), PLAIN)
    assert plan.find(NORM, None, dtype) == []
    assert composed(plan, dtype) == []
    answer = plan.explain("all_reduce_rms_norm", dtype=dtype)
    assert answer.chosen is None
    assert dict(answer.others)["every"] == f"all_reduce_rms_norm wants a floating-point dtype, found {dtype}"


def test_a_dtype_that_only_a_backend_for_every_dtype_serves_is_served_and_composed_by_it() -> None:
    fused = backend("fused", "all_reduce_rms_norm", dtypes=(), max_bytes=99)
    plan = plan_of(fused, backend("every", "all_reduce", dtypes=()))
    assert [r.backend for r in plan.find(NORM, None, "float64")] == ["fused"]
    assert composed(plan, "float64") == [(100, None, "every")]


def test_rank_order_rules_out_a_backend_that_adds_in_any_order_and_an_all_reduce_that_does() -> None:
    ordered = backend("ordered", "all_reduce", numerics="rank_order")
    plan = plan_of(FUSED, PLAIN, ordered, numerics="rank_order")
    assert plan.find(NORM, None, "float32") == []
    assert composed(plan) == [(0, None, "ordered")]
    reason = dict(plan.explain("all_reduce_rms_norm", nbytes=150).others)["fused"]
    assert reason == "does not add in rank order, which the setting numerics=rank_order demands"
    nothing = plan_of(FUSED, PLAIN, numerics="rank_order").explain("all_reduce_rms_norm", nbytes=150)
    assert nothing.chosen is None
    assert dict(nothing.others)["torch"] == (
        "does not declare all_reduce_rms_norm, nor can it be composed: "
        "does not add in rank order, which the setting numerics=rank_order demands"
    )


@st.composite
def backends(draw: st.DrawFn) -> list[BackendSpec]:
    out = []
    for name in ["a", "b", "c", "d"][: draw(st.integers(0, 4))]:
        low = draw(st.integers(0, 12))
        high = draw(st.one_of(st.none(), st.integers(low, 14)))
        capabilities = draw(st.sets(st.sampled_from(["all_reduce", "all_reduce_rms_norm"]), min_size=1))
        numerics = draw(st.sampled_from(["unordered", "rank_order"]))
        out.append(backend(name, *capabilities, min_bytes=low, max_bytes=high, numerics=numerics))
    return out


@given(backends(), st.sampled_from(["any", "rank_order"]))
def test_a_size_is_composed_by_the_route_of_its_all_reduce_exactly_where_no_backend_has_it(
    specs: list[BackendSpec], numerics: str
) -> None:
    plan = plan_of(*specs, numerics=numerics)

    def serving(routes: list[Any], nbytes: int) -> list[str]:
        return [r.backend for r in routes if r.low <= nbytes and (r.high is None or nbytes < r.high)]

    for nbytes in range(18):
        whole = serving(plan.find(NORM, None, "float32"), nbytes)
        parts = serving(plan.find(Collective.ALL_REDUCE, ReduceOp.SUM, "float32"), nbytes)
        made = serving(plan.composed(NORM, None, "float32"), nbytes)
        assert made == ([] if whole else parts)
        chosen = whole[0] if whole else f"composed of all_reduce by {made[0]} and torch" if made else None
        assert plan.explain("all_reduce_rms_norm", nbytes=nbytes).chosen == chosen


# What a plan says.


def test_explain_names_the_backend_that_has_it_whole() -> None:
    answer = plan_of(FUSED, PLAIN).explain("all_reduce_rms_norm", nbytes=150)
    assert str(answer).splitlines() == [
        "all_reduce_rms_norm(float32, 150 bytes) in 'tp' over [0, 1] on cpu: fused",
        "  not torch: does not declare all_reduce_rms_norm",
    ]


def test_explain_says_of_what_it_is_composed_and_why_no_backend_has_it_whole() -> None:
    answer = plan_of(FUSED, PLAIN).explain("all_reduce_rms_norm", nbytes=200)
    assert str(answer).splitlines() == [
        "all_reduce_rms_norm(float32, 200 bytes) in 'tp' over [0, 1] on cpu: composed of all_reduce by torch and torch",
        "  not fused: is for messages up to 199 bytes",
        "  not torch: does not declare all_reduce_rms_norm",
    ]
    assert answer.to_json()["chosen"] == "composed of all_reduce by torch and torch"


def test_the_text_of_a_plan_shows_what_is_composed_beside_what_is_not() -> None:
    lines = [line.strip() for line in str(plan_of(FUSED, PLAIN)).splitlines() if line.strip().startswith("all_reduce_rms_norm")]
    assert lines == [
        "all_reduce_rms_norm composed of all_reduce by torch and torch bfloat16, float32, 0 <= bytes < 100",
        "all_reduce_rms_norm fused       bfloat16, float32, 100 <= bytes < 200",
        "all_reduce_rms_norm composed of all_reduce by torch and torch bfloat16, float32, 200 <= bytes < inf",
        "all_reduce_rms_norm_quant composed of all_reduce by torch and torch bfloat16, float32, 0 <= bytes < 100",
        "all_reduce_rms_norm_quant composed of all_reduce_rms_norm by fused and torch bfloat16, float32, 100 <= bytes < 200",
        "all_reduce_rms_norm_quant composed of all_reduce by torch and torch bfloat16, float32, 200 <= bytes < inf",
    ]


def test_a_refusal_gives_what_stands_against_both_ways() -> None:
    error = plan_of(FUSED, backend("small", "all_reduce", max_bytes=49)).unsupported("[tp rank 0/2]", NORM, None, "float32", 60)
    assert str(error) == (
        "[tp rank 0/2] all_reduce_rms_norm of 60 bytes of float32 is served by no backend of this group "
        "(fused: is for messages from 100 bytes, nor can it be composed: does not declare all_reduce; "
        "small: does not declare all_reduce_rms_norm, nor can it be composed: is for messages up to 49 bytes): "
        "convert the tensor, or install a backend that serves it"
    )


def test_the_command_explain_takes_it() -> None:
    parser = argparse.ArgumentParser()
    doctor.add_commands(parser.add_subparsers())
    assert parser.parse_args(["explain", "all_reduce_rms_norm"]).collective == "all_reduce_rms_norm"
