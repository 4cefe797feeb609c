"""Specs: what a plugin may declare, and the form in which core holds it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import (
    BackendSpec,
    Capability,
    Collective,
    Numerics,
    PageStoreSpec,
    QuantFormat,
    ReduceOp,
    SyncField,
    SyncSpec,
    TransferSpec,
    Vote,
)


def backend(**changes: Any) -> BackendSpec:
    values: dict[str, Any] = {
        "name": "mine",
        "api": (1, 0),
        "factory": "mine.backend:Mine",
        "probe": "mine.backend:probe",
        "capabilities": {Capability.ALL_REDUCE},
        "dtypes": {"float32", "bfloat16"},
        "device": "cpu",
    }
    return BackendSpec(**(values | changes))


def test_collections_become_frozensets_of_enumeration_members() -> None:
    spec = backend(capabilities=["all_reduce", "barrier"], dtypes=["float32", "float32"], ops=["max", "sum"])
    assert spec.capabilities == frozenset({Capability.ALL_REDUCE, Capability.BARRIER})
    assert spec.dtypes == frozenset({"float32"})
    assert spec.ops == frozenset({ReduceOp.SUM, ReduceOp.MAX})
    assert all(isinstance(value, frozenset) for value in (spec.capabilities, spec.dtypes, spec.ops))


def test_numerics_may_be_given_as_text() -> None:
    assert backend(numerics="rank_order").numerics is Numerics.RANK_ORDER


def test_options_are_a_copy_of_what_the_plugin_passed() -> None:
    passed = {"slots": 4}
    spec = backend(options=passed)
    passed["slots"] = 5
    assert spec.options == {"slots": 4}


def test_api_may_be_a_list_and_is_held_as_a_tuple() -> None:
    assert backend(api=[1, 0]).api == (1, 0)


@pytest.mark.parametrize("api", [(), (1,), (1, 0, 0), "1.0", (1, "0"), (1.0, 0), 1.0, 1, None])
def test_an_api_that_is_not_two_integers_is_refused(api: Any) -> None:
    with pytest.raises(ValueError, match="mine: api must be two integers"):
        backend(api=api)


@pytest.mark.parametrize("name", ["", "custom-ar", "2fast", "a.b", "a b"])
def test_a_name_that_cannot_be_a_table_and_a_variable_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must be an identifier"):
        backend(name=name)


@pytest.mark.parametrize("label", ["factory", "probe"])
@pytest.mark.parametrize("path", ["", "mine.backend", "mine.backend:", ":Mine", "mine/backend.py"])
def test_a_path_without_module_and_attribute_is_refused(label: str, path: str) -> None:
    with pytest.raises(ValueError, match=f"mine: {label} must read 'package.module:attribute'"):
        backend(**{label: path})


@pytest.mark.parametrize(
    "changes",
    [{"capabilities": {"teleport"}}, {"ops": {"prod"}}, {"numerics": "exact"}],
    ids=["capability", "op", "numerics"],
)
def test_a_value_outside_its_enumeration_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"teleport|prod|exact"):
        backend(**changes)


@pytest.mark.parametrize("label", ["capabilities", "dtypes", "ops"])
def test_one_name_instead_of_a_collection_of_names_is_refused(label: str) -> None:
    text = {"capabilities": "all_reduce", "dtypes": "float32", "ops": "sum"}[label]
    with pytest.raises((TypeError, ValueError)):
        backend(**{label: text})


def test_a_largest_size_below_the_smallest_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes 10 is below min_bytes 11"):
        backend(min_bytes=11, max_bytes=10)


def test_one_single_size_is_a_valid_range() -> None:
    spec = backend(min_bytes=11, max_bytes=11)
    assert (spec.min_bytes, spec.max_bytes) == (11, 11)


def test_arguments_are_named_so_that_fields_may_be_added() -> None:
    with pytest.raises(TypeError):
        BackendSpec("mine", (1, 0), "m:C", "m:p", {Capability.ALL_REDUCE}, {"float32"}, "cpu")  # type: ignore[call-arg]


def test_collectives_are_the_capabilities_that_are_operations_in_the_order_of_the_enumeration() -> None:
    spec = backend(capabilities={"barrier", "capture", "symmetric_memory", "all_reduce", "broadcast"})
    assert spec.collectives() == [Collective.ALL_REDUCE, Collective.BROADCAST, Collective.BARRIER]


@given(
    dtypes=st.permutations(["float32", "bfloat16", "float16", "int8"]),
    ops=st.permutations(["sum", "min", "max"]),
    capabilities=st.permutations(["all_reduce", "barrier", "capture"]),
)
def test_json_of_equal_specs_is_equal_whatever_order_they_were_written_in(
    dtypes: list[str], ops: list[str], capabilities: list[str]
) -> None:
    one = backend(dtypes=dtypes, ops=ops, capabilities=capabilities)
    other = backend(dtypes=sorted(dtypes), ops=sorted(ops), capabilities=sorted(capabilities))
    assert one == other
    assert repr(one.to_json()) == repr(other.to_json())


def test_json_lists_are_sorted_because_sets_have_another_order_in_each_process() -> None:
    json = backend(
        capabilities=list(Capability),
        dtypes=["int8", "float32", "bfloat16"],
        ops=["sum", "min", "max", "avg"],
        formats=list(QuantFormat),
    ).to_json()
    assert json["ops"] == ["avg", "max", "min", "sum"]
    assert json["dtypes"] == ["bfloat16", "float32", "int8"]
    assert json["formats"] == sorted(f.value for f in QuantFormat)
    assert json["capabilities"] == sorted(c.value for c in Capability)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"api": (1, 1)},
        {"factory": "other:C"},
        {"capabilities": {"barrier"}},
        {"dtypes": {"int8"}},
        {"device": "cuda"},
        {"ops": {"max"}},
        {"min_world_size": 3},
        {"max_world_size": 8},
        {"min_bytes": 1},
        {"max_bytes": 1},
        {"numerics": "rank_order"},
        {"priority": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_json_shows_every_difference_that_bears_on_the_plan(changes: dict[str, Any]) -> None:
    assert backend(**changes).to_json() != backend().to_json()


def test_transfer_spec_checks_its_factory_and_freezes_its_capabilities() -> None:
    assert TransferSpec(name="nixl", api=(1, 0), factory="m:C", capabilities=["rdma"]).capabilities == frozenset({"rdma"})
    with pytest.raises(ValueError, match="nixl: factory must read"):
        TransferSpec(name="nixl", api=(1, 0), factory="m")


def test_page_store_spec_knows_three_tiers() -> None:
    for tier in ("device", "host", "storage"):
        assert PageStoreSpec(name="disk", api=(1, 0), factory="m:C", tier=tier).tier == tier
    with pytest.raises(ValueError, match="tier must be device, host or storage, found 'cloud'"):
        PageStoreSpec(name="disk", api=(1, 0), factory="m:C", tier="cloud")


def test_page_store_spec_freezes_its_capabilities() -> None:
    made = PageStoreSpec(name="disk", api=(1, 0), factory="m:C", capabilities=["durable", "shared"])
    assert made.capabilities == frozenset({"durable", "shared"})
    with pytest.raises(ValueError, match="disk: capabilities must be a collection of words, found 'durable'"):
        PageStoreSpec(name="disk", api=(1, 0), factory="m:C", capabilities="durable")


def test_sync_spec_holds_its_fields_in_order_with_their_rules() -> None:
    spec = SyncSpec(name="pages", api=(1, 0), fields=[SyncField("free", "min"), SyncField("stop", Vote.ANY)])  # type: ignore[arg-type]
    assert spec.fields == (SyncField("free", Vote.MIN), SyncField("stop", Vote.ANY))


def test_sync_field_refuses_a_rule_that_is_no_vote() -> None:
    with pytest.raises(ValueError, match="median"):
        SyncField("free", "median")  # type: ignore[arg-type]


@pytest.mark.parametrize("names", [[], ["free", "free"]])
def test_sync_spec_wants_each_field_once(names: list[str]) -> None:
    with pytest.raises(ValueError, match="fields must be named, once each"):
        SyncSpec(name="pages", api=(1, 0), fields=tuple(SyncField(n, Vote.MIN) for n in names))
