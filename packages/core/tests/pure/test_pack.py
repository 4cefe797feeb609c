"""What a leader publishes of a round, and who looks after late ranks: pure, or over a store in this process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane.agree.pack import pack, unpack
from commplane.select import alike

SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, 0.5, "", "a", "é\n"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=6
)


def through_json(values: list[Any]) -> list[Any]:
    return list(unpack(json.loads(json.dumps(pack(values)))))


@settings(max_examples=200)
@given(st.lists(VALUES, min_size=1, max_size=12))
def test_what_is_packed_comes_back_as_it_was(values: list[Any]) -> None:
    assert json.dumps(through_json(values)) == json.dumps(values)  # as text: 1, 1.0 and True are equal


@given(st.lists(st.fixed_dictionaries({"host": st.sampled_from("ab"), "pid": st.integers(0, 9)}), min_size=1, max_size=20))
def test_objects_with_the_same_keys_come_back_as_they_were(values: list[Any]) -> None:
    assert through_json(values) == values


@given(st.lists(VALUES, min_size=1, max_size=12))
def test_the_groups_hold_each_position_once_with_its_value(values: list[Any]) -> None:
    groups = unpack(pack(values)).groups
    assert sorted(i for _, positions in groups for i in positions) == list(range(len(values)))
    assert all(json.dumps(values[i]) == json.dumps(value) for value, positions in groups for i in positions)
    texts = [json.dumps(value) for value, _ in groups]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("ranks", [8, 1024])
def test_what_all_say_is_written_once_whatever_their_number(ranks: int) -> None:
    record = {"backends": {"a": {"usable": True, "reason": ""}}, "text": "x" * 500}
    assert len(json.dumps(pack([record] * ranks))) < 600
    one_differs = [record] * (ranks - 1) + [{**record, "text": "y" * 500}]
    assert len(json.dumps(pack(one_differs))) < 1200


def test_values_that_are_no_gathered_ones_are_grouped_in_the_order_in_which_they_come() -> None:
    assert list(alike(["b", "a", "b"])) == [("b", [0, 2]), ("a", [1])]
