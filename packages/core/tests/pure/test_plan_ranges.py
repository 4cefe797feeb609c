"""Sizes that backends ask for once they are open, and what a plan makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import BackendSpec, Collective, CommBackend, GroupKey, ReduceOp, SizeRange
from commplane.select import Candidate, Offer, Plan, ask, compile_routes, said
from commplane.select.offers import of_graphs

KEY = GroupKey((4, 6), "cpu", "tp")
SUM = (Collective.ALL_REDUCE, ReduceOp.SUM)
K = 1024

NORM = (Collective.ALL_REDUCE_RMS_NORM, None, "float32")


def backend(name: str = "mine", **changes: Any) -> BackendSpec:
    values: dict[str, Any] = {"name": name, "api": (1, 2), "factory": "m:C", "probe": "m:p", "device": "cpu"}
    return BackendSpec(**(values | {"capabilities": {"all_reduce"}, "dtypes": {"float32"}} | changes))


def offer(*ranges: SizeRange, name: str = "mine", capturing: bool = False, **changes: Any) -> Offer:
    return replace(Offer(name, Collective.ALL_REDUCE, "float32", capturing, ranges), **changes)


def plan_of(specs: Sequence[BackendSpec], *offers: Offer) -> Plan:
    return Plan.of(KEY, [Candidate(s.name, "d 1", "ready") for s in specs], specs, "any", offers)


def routes(plan: Plan, capturing: bool = False) -> list[tuple[int, int | None, str, str]]:
    return [(r.low, r.high, r.backend, r.algorithm) for r in plan.find(*SUM, "float32", capturing=capturing)]


TWO = (SizeRange(0, 64 * K, "one_shot"), SizeRange(K * K, None, "two_shot"))


def test_what_a_backend_leaves_out_goes_to_the_next_one_and_routes_carry_the_algorithm() -> None:
    assert routes(plan_of([backend(), backend("torch")], offer(*TWO))) == [
        (0, 64 * K, "mine", "one_shot"),
        (64 * K, K * K, "torch", ""),
        (K * K, None, "mine", "two_shot"),
    ]


def test_ranges_are_cut_to_the_limits_of_the_spec() -> None:
    spec = backend(min_bytes=100, max_bytes=2 * K * K - 1)
    assert routes(plan_of([spec, backend("torch")], offer(*TWO))) == [
        (0, 100, "torch", ""),
        (100, 64 * K, "mine", "one_shot"),
        (64 * K, K * K, "torch", ""),
        (K * K, 2 * K * K, "mine", "two_shot"),
        (2 * K * K, None, "torch", ""),
    ]


def test_an_empty_answer_takes_a_backend_out_of_that_dtype_alone() -> None:
    specs = [backend(dtypes={"float32", "float16"}), backend("torch", dtypes={"float32", "float16"})]
    plan = plan_of(specs, offer())
    assert routes(plan) == [(0, None, "torch", "")]
    assert [r.backend for r in plan.find(*SUM, "float16")] == ["mine"]


def test_neighbours_with_one_algorithm_are_one_route_and_one_line() -> None:
    plan = plan_of([backend()], offer(SizeRange(0, 8, "push"), SizeRange(8, 16, "push"), SizeRange(16, None, "pull")))
    assert routes(plan) == [(0, 16, "mine", "push"), (16, None, "mine", "pull")]
    assert [line.split() for line in str(plan).splitlines() if line.startswith("  all_reduce ")] == [
        ["all_reduce", "mine", "push", "sum", "float32,", "0", "<=", "bytes", "<", "16"],
        ["all_reduce", "mine", "pull", "sum", "float32,", "16", "<=", "bytes", "<", "inf"],
    ]


def test_a_spec_without_dtypes_answers_for_all_of_them_at_once() -> None:
    specs = [backend(dtypes=()), backend("torch", dtypes={"float32"})]
    plan = plan_of(specs, offer(SizeRange(0, 100, "push"), dtype="*"))
    assert routes(plan) == [(0, 100, "mine", "push"), (100, None, "torch", "")]
    assert [(r.low, r.high, r.backend) for r in plan.find(*SUM, "complex64")] == [(0, 100, "mine")]


def test_explain_names_the_algorithm_its_range_and_why_the_others_do_not_run() -> None:
    plan = plan_of([backend(), backend("torch")], offer(*TWO))
    answer = plan.explain(nbytes=2 * K * K)
    assert str(answer).splitlines()[0].endswith(" on cpu: mine two_shot, 1048576 <= bytes < inf")
    assert (answer.chosen, answer.to_json()["algorithm"], answer.to_json()["bytes"]) == ("mine", "two_shot", [K * K, None])
    between = plan.explain(nbytes=64 * K)
    reason = "offers all_reduce of float32 for 0 <= bytes < 65536 (one_shot), 1048576 <= bytes < inf (two_shot) only"
    assert (between.chosen, between.others) == ("torch", (("mine", reason),))
    assert plan_of([backend(), backend("torch")], offer()).explain().others == (
        ("mine", "offers all_reduce of float32 at no size"),
    )


def capturing_plan(eager: Sequence[SizeRange], captured: Sequence[SizeRange], **changes: Any) -> Plan:
    specs = [backend(**{"capabilities": {"all_reduce", "capture"}} | changes), backend("torch")]
    return plan_of(specs, offer(*eager), offer(*captured, capturing=True))


def test_captured_calls_have_routes_of_their_own_and_lines_only_for_what_differs() -> None:
    plan = capturing_plan([SizeRange(0, 100, "push")], [SizeRange(0, 50, "registered")])
    assert routes(plan) == [(0, 100, "mine", "push"), (100, None, "torch", "")]
    assert routes(plan, capturing=True) == [(0, 50, "mine", "registered"), (50, None, "torch", "")]
    assert plan.explain(nbytes=60).chosen == "mine"
    in_graph = plan.explain(nbytes=60, graph=True)
    assert in_graph.chosen == "torch" and "60 bytes) in a graph in 'tp'" in in_graph.question
    lines = [line.split()[:4] for line in str(plan).splitlines() if line.startswith("  all_")]
    assert lines[:2] == [["all_reduce", "mine", "push", "sum"], ["all_reduce", "torch", "sum", "float32,"]]
    assert lines[2:4] == [["all_reduce", "(graph)", "mine", "registered"], ["all_reduce", "(graph)", "torch", "sum"]]


def test_a_backend_that_answers_the_same_for_captures_leaves_the_plan_as_it_is() -> None:
    same = [SizeRange(0, 100, "push")]
    plan = capturing_plan(same, same)
    assert plan.captured is None and plan.to_json()["captured"] is None
    assert "(graph)" not in str(plan)
    assert routes(plan, capturing=True) == routes(plan)


def test_where_nothing_captures_calls_in_a_graph_go_the_ordinary_way() -> None:
    plan = capturing_plan([SizeRange(0, 100)], [SizeRange(0, 50)], capabilities={"all_reduce"})
    assert plan.captured is None
    assert plan.explain(nbytes=60, graph=True).chosen == plan.explain(nbytes=60).chosen == "mine"


def test_a_fused_norm_is_composed_of_the_routes_of_its_own_capture_state() -> None:
    plan = capturing_plan([SizeRange(0, 100)], [SizeRange(0, 50)])
    assert [(r.low, r.high, r.backend) for r in plan.composed(*NORM)] == [
        (0, 100, "mine"),
        (100, None, "torch"),
    ]
    assert [r.high for r in plan.composed(*NORM, capturing=True)] == [50, None]
    for name in ("all_reduce_rms_norm (graph) ", "all_reduce_rms_norm_quant (graph) "):
        assert sum(name in line and "composed of" in line for line in str(plan).splitlines()) == 2


def test_algorithms_do_not_cut_what_a_norm_is_composed_of() -> None:
    plan = plan_of([backend()], offer(SizeRange(0, 8, "push"), SizeRange(8, None, "pull")))
    assert [(r.low, r.high, r.backend) for r in plan.composed(*NORM)] == [(0, None, "mine")]


@pytest.mark.parametrize(
    "other",
    [
        (SizeRange(0, 64 * K, "one_shot"), SizeRange(K * K, None, "two_shot_pull")),
        (SizeRange(0, 64 * K, "one_shot"), SizeRange(K * K + 1, None, "two_shot")),
        (SizeRange(0, 64 * K, "one_shot"),),
        (),
    ],
)
def test_other_answers_are_another_plan_and_the_difference_is_one_line(other: Sequence[SizeRange]) -> None:
    ours, theirs = offer(*TWO), offer(*other)
    assert plan_of([backend()], ours).digest != plan_of([backend()], theirs).digest
    assert plan_of([backend()], ours).digest == plan_of([backend()], offer(*TWO)).digest
    assert said([ours]).keys() == said([theirs]).keys()
    assert said([ours]) != said([theirs])


def test_answers_that_another_backend_hides_are_part_of_the_digest_all_the_same() -> None:
    specs = [backend("first"), backend()]
    plans = [plan_of(specs, offer(SizeRange(0, high))) for high in (8, 16)]
    assert plans[0].routes == plans[1].routes
    assert plans[0].digest != plans[1].digest


class Answers(CommBackend):
    """Open, and with an answer for each question."""

    def __init__(self, answers: Mapping[tuple[str, str, bool], Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, bool]] = []

    def open(self, context: Any) -> None:
        raise AssertionError("nothing is opened here")

    def close(self) -> None:
        raise AssertionError("nothing is closed here")

    def ranges(self, collective: Collective, dtype: str, capturing: bool = False) -> Sequence[SizeRange] | None:
        self.asked.append((str(collective), dtype, capturing))
        return self.answers.get((str(collective), dtype, capturing))  # type: ignore[no-any-return]


def test_a_backend_is_asked_once_for_each_sized_collective_and_dtype_eager_and_captured() -> None:
    backend_ = Answers({("broadcast", "int8", True): [SizeRange(8, 9, "b"), SizeRange(0, 8, "a")]})
    offers = ask(backend(capabilities={"broadcast", "barrier"}, dtypes={"int8", "float32"}), backend_)
    assert backend_.asked == [("broadcast", d, c) for d in ("float32", "int8") for c in (False, True)]
    assert offers == (Offer("mine", Collective.BROADCAST, "int8", True, (SizeRange(0, 8, "a"), SizeRange(8, 9, "b"))),)
    assert of_graphs(offers)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ([SizeRange(0, 10), SizeRange(9, 20)], ValueError, "do not overlap, found 0 <= bytes < 10 and 9 <= bytes < 20"),
        ([SizeRange(0, None), SizeRange(9, 20)], ValueError, "do not overlap"),
        ([(0, 10, "push")], TypeError, "must give SizeRanges, found"),
    ],
)
def test_an_answer_that_is_no_set_of_ranges_is_an_error_that_shows_it(answer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ask(backend(), Answers({("all_reduce", "float32", False): answer}))


@pytest.mark.parametrize(("low", "high"), [(-1, 4), (4, 4), (5, 4)])
def test_a_range_that_holds_no_size_is_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="wants 0 <= low < high in bytes"):
        SizeRange(low, high)


@st.composite
def answers(draw: st.DrawFn) -> tuple[SizeRange, ...]:
    cuts = sorted(draw(st.sets(st.integers(0, 16), max_size=6)))
    return tuple(SizeRange(a, b, draw(st.sampled_from(["", "x", "y"]))) for a, b in zip(cuts[::2], cuts[1::2], strict=False))


@given(answers(), answers(), st.integers(0, 17))
def test_every_size_goes_to_the_first_backend_that_offers_it(first: Any, second: Any, nbytes: int) -> None:
    specs = [backend("a", max_bytes=12), backend("b", min_bytes=3), backend("torch")]
    made = compile_routes(specs, "any", [offer(*first, name="a"), offer(*second, name="b")])
    serving = [r for r in made if (r.collective, r.op, r.dtype) == (*SUM, "float32") and r.serves(nbytes)]
    in_a, in_b = (next((r for r in ranges if nbytes in r), None) for ranges in (first, second))
    wanted = ("a", in_a.algorithm) if in_a and nbytes <= 12 else ("b", in_b.algorithm) if in_b and nbytes >= 3 else ("torch", "")
    assert [(r.backend, r.algorithm) for r in serving] == [wanted]
