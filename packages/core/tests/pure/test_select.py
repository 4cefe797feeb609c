"""The choice for one group is a pure function of what the ranks published."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import BackendSpec, GroupKey
from commplane.errors import AgreementError
from commplane.select import choose, difference, static_refusal

NAMES = ["a", "b", "c", "torch"]
Submission = dict[str, Any]


def key(size: int) -> GroupKey:
    """A group whose global ranks are not its group ranks."""
    return GroupKey(tuple(10 + 3 * r for r in range(size)), "cpu", "tp")


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    usable = draw(st.booleans())
    return {
        "spec": {"priority": draw(st.integers(0, 2))},
        "dist": "dist 1.0",
        "usable": usable,
        "reason": "" if usable else draw(st.sampled_from(["no driver", "spans hosts"])),
    }


@st.composite
def submissions(draw: st.DrawFn) -> list[Submission]:
    """What the ranks of one group published, all with the same request."""
    size = draw(st.integers(1, 4))
    wanted = draw(st.lists(st.sampled_from(NAMES), unique=True))
    agreed = {n: draw(entries()) for n in NAMES}
    out = []
    for _rank in range(size):
        backends = {}
        for name in NAMES:
            # Mostly what the others have too, so that backends which every rank can use are not rare.
            kind = draw(st.sampled_from(["agreed", "agreed", "agreed", "agreed", "own", "absent"]))
            if kind != "absent":
                backends[name] = copy.deepcopy(agreed[name]) if kind == "agreed" else draw(entries())
        out.append({"request": {"name": "tp", "backends": list(wanted)}, "backends": backends})
    return out


def usable_everywhere(name: str, published: list[Submission]) -> bool:
    found = [s["backends"].get(name) for s in published]
    return all(e is not None and e["usable"] and e["spec"] == found[0]["spec"] for e in found)


@given(submissions())
def test_the_choice_is_deterministic_and_leaves_its_input_alone(published: list[Submission]) -> None:
    before = json.dumps(published)
    assert choose(key(len(published)), published) == choose(key(len(published)), copy.deepcopy(published))
    assert json.dumps(published) == before


@given(submissions(), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_in_which_mappings_were_filled(published: list[Submission], random: Any) -> None:
    shuffled = []
    for s in published:
        names = list(s["backends"])
        random.shuffle(names)
        shuffled.append({"backends": {n: s["backends"][n] for n in names}, "request": dict(reversed(s["request"].items()))})
    assert choose(key(len(published)), shuffled) == choose(key(len(published)), published)


@given(submissions())
def test_only_backends_that_every_rank_has_and_can_use_and_declares_alike_are_chosen(
    published: list[Submission],
) -> None:
    for name in choose(key(len(published)), published).order:
        assert usable_everywhere(name, published)


@given(submissions())
def test_every_backend_is_either_chosen_or_refused_with_a_reason(published: list[Submission]) -> None:
    draft = choose(key(len(published)), published)
    refused = [c.name for c in draft.refused]
    assert sorted([*draft.order, *refused]) == sorted({n for s in published for n in s["backends"]})
    assert all(c.reason and c.state in ("probe", "policy") for c in draft.refused)


@given(submissions())
def test_refusals_are_listed_in_the_order_of_names_so_that_plans_compare_equal(published: list[Submission]) -> None:
    refused = choose(key(len(published)), published).refused
    for state in ("probe", "policy"):
        names = [c.name for c in refused if c.state == state]
        assert names == sorted(names)


@given(submissions())
def test_torch_is_last_whenever_it_is_usable(published: list[Submission]) -> None:
    order = choose(key(len(published)), published).order
    assert ("torch" in order) is usable_everywhere("torch", published)
    assert "torch" not in order[:-1]


@given(submissions())
def test_a_requested_order_is_kept_and_nothing_else_but_torch_is_chosen(published: list[Submission]) -> None:
    wanted = published[0]["request"]["backends"]
    order = [n for n in choose(key(len(published)), published).order if n != "torch"]
    if wanted:
        assert order == [n for n in wanted if n != "torch" and usable_everywhere(n, published)]


@given(submissions())
def test_without_a_request_higher_priority_comes_first_and_equal_ones_go_by_name(published: list[Submission]) -> None:
    published = [{**s, "request": {"backends": []}} for s in published]
    order = [n for n in choose(key(len(published)), published).order if n != "torch"]
    spec = {n: published[0]["backends"][n]["spec"] for n in order}
    assert order == sorted(order, key=lambda n: (-spec[n]["priority"], n))
    assert set(order) == {n for n in NAMES if n != "torch" and usable_everywhere(n, published)}


def entry(usable: bool = True, reason: str = "", **spec: Any) -> dict[str, Any]:
    return {"spec": {"priority": 0} | spec, "dist": "mine 1.0", "usable": usable, "reason": reason}


def submit(*backends: dict[str, Any], wanted: list[str] | None = None) -> list[Submission]:
    return [{"request": {"name": "tp", "backends": wanted or []}, "backends": b} for b in backends]


def reason_of(name: str, published: list[Submission]) -> str:
    return next(c.reason for c in choose(key(len(published)), published).refused if c.name == name)


def test_a_backend_that_is_asked_for_twice_is_chosen_once() -> None:
    assert choose(key(2), submit({"a": entry()}, {"a": entry()}, wanted=["a", "a"])).order == ("a",)


def test_asking_for_torch_alone_leaves_all_others_out_by_policy() -> None:
    draft = choose(key(1), submit({"a": entry(), "torch": entry()}, wanted=["torch"]))
    assert draft.order == ("torch",)
    assert [(c.name, c.state) for c in draft.refused] == [("a", "policy")]


def test_a_priority_below_zero_keeps_a_backend_for_those_who_name_it() -> None:
    published = {"a": entry(), "shy": entry(priority=-1), "torch": entry()}
    draft = choose(key(1), submit(published))
    assert draft.order == ("a", "torch")
    assert [(c.name, c.state, c.reason) for c in draft.refused] == [
        ("shy", "policy", "is used only where it is asked for by name")
    ]
    assert choose(key(1), submit(published, wanted=["shy"])).order == ("shy", "torch")


def test_a_missing_backend_names_the_global_ranks_that_lack_it() -> None:
    assert reason_of("a", submit({"a": entry()}, {}, {})) == "is not available on ranks 13, 16"


def test_a_refusal_of_some_ranks_names_them_with_each_reason() -> None:
    published = submit({"a": entry()}, {"a": entry(False, "no driver")}, {"a": entry(False, "full")})
    assert reason_of("a", published) == "rank 13: no driver; rank 16: full"


def test_a_refusal_of_all_ranks_for_one_reason_is_that_reason() -> None:
    published = submit({"a": entry(False, "spans hosts")}, {"a": entry(False, "spans hosts")})
    assert reason_of("a", published) == "spans hosts"


def test_specs_that_differ_rule_the_backend_out_and_the_difference_is_shown() -> None:
    published = submit({"a": entry(bytes=[0, 1])}, {"a": entry(bytes=[0, 2])})
    text = reason_of("a", published)
    assert text == "ranks disagree on the spec of backend 'a': rank 10 has bytes=[0, 1]; rank 13 has bytes=[0, 2]"


@given(st.lists(st.sampled_from([[], ["a"], ["a", "b"], ["b", "a"]]), min_size=1, max_size=5))
def test_different_requests_are_an_error_and_equal_ones_are_not(requests: list[list[str]]) -> None:
    published = [{"request": {"name": "tp", "backends": r}, "backends": {}} for r in requests]
    if all(r == requests[0] for r in requests):
        assert choose(key(len(requests)), published).order == ()
        return
    with pytest.raises(AgreementError) as caught:
        choose(key(len(requests)), published)
    text = str(caught.value)
    assert text.startswith("[tp] ranks disagree on the communicator: ")
    assert "name=" not in text  # equal on all ranks
    for rank, request in zip(key(len(requests)).ranks, requests, strict=True):
        assert str(rank) in text and f"backends={request!r}" in text


def test_a_missing_submission_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="shorter"):
        choose(key(2), submit({"a": entry()}))


# difference


@given(st.dictionaries(st.integers(0, 20), st.sampled_from(["x", "y"]), min_size=1))
def test_no_difference_is_none_and_each_rank_stands_beside_its_own_value(values: dict[int, str]) -> None:
    text = difference("the thing", values)
    if len(set(values.values())) == 1:
        assert text is None
        return
    assert text is not None
    parts = text.removeprefix("ranks disagree on the thing: ").split("; ")
    assert len(parts) == 2
    for part in parts:
        value = part[-2]
        ranks = [r for r, v in values.items() if v == value]
        word = "rank" if len(ranks) == 1 else "ranks"
        assert part == f"{word} {', '.join(map(str, ranks))} {'has' if len(ranks) == 1 else 'have'} {value!r}"


@given(st.lists(st.dictionaries(st.sampled_from("pqr"), st.sampled_from([0, 1, None])), min_size=2, max_size=4))
def test_of_mappings_exactly_the_entries_that_differ_are_shown(values: list[dict[str, Any]]) -> None:
    text = difference("the thing", dict(enumerate(values)))
    if all(v == values[0] for v in values):
        assert text is None
        return
    assert text is not None
    missing = object()
    for name in "pqr":
        differs = any(v.get(name, missing) != values[0].get(name, missing) for v in values)
        assert (f"{name}=" in text) is differs


def test_an_entry_that_only_some_ranks_have_shows_as_nothing_on_the_others() -> None:
    assert difference("it", {0: {"p": 1}, 1: {}}) == "ranks disagree on it: rank 0 has p=1; rank 1 has p='nothing'"


# static_refusal


def backend(**changes: Any) -> BackendSpec:
    values: dict[str, Any] = {"name": "mine", "api": (1, 0), "factory": "m:C", "probe": "m:p", "device": "cpu"}
    return BackendSpec(**(values | {"capabilities": {"all_reduce"}, "dtypes": {"float32"}} | changes))


@pytest.mark.parametrize(
    ("changes", "size", "refusal"),
    [
        ({}, 2, None),
        ({"device": "any"}, 2, None),
        ({"device": "cuda"}, 2, "serves cuda, the group is on cpu"),
        ({}, 1, "serves groups of 2 ranks or more, this one has 1"),
        ({"min_world_size": 4}, 3, "serves groups of 4 ranks or more, this one has 3"),
        ({"min_world_size": 4}, 4, None),
        ({"max_world_size": 4}, 4, None),
        ({"max_world_size": 4}, 5, "serves groups of up to 4 ranks, this one has 5"),
        ({"name": "torch"}, 1, None),
    ],
)
def test_a_declared_limit_refuses_a_group_outside_of_it(changes: dict[str, Any], size: int, refusal: str | None) -> None:
    assert static_refusal(backend(**changes), key(size)) == refusal
