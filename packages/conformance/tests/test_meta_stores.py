"""The tests of page stores accept an honest store, and each wrong one is found by the test that is meant for it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import wrong_stores

from commplane.api import PageStoreSpec
from commplane_conformance.pages import test_life, test_misuse, test_namespaces, test_room, test_round_trip, test_survives
from commplane_conformance.pages.place import Place
from commplane_conformance.provider import StoreSubject

pytestmark = pytest.mark.timeout(120)
MODULES = (test_life, test_misuse, test_namespaces, test_room, test_round_trip, test_survives)
TESTS = {name: test for module in MODULES for name, test in vars(module).items() if name.startswith("test_")}
ROOM = 40
CAUGHT = {
    "LaterDurable": "test_after_kill_9_every_acknowledged_page_is_found_and_no_torn_one",
    "Torn": "test_after_kill_9_every_acknowledged_page_is_found_and_no_torn_one",
    "Unchecked": "test_damaged_bytes_are_not_served_and_may_be_put_again",
    "KeepsDamage": "test_damaged_bytes_are_not_served_and_may_be_put_again",
    "OneNamespace": "test_namespaces_do_not_see_each_other",
    "ShortKeys": "test_keys_of_1_to_64_bytes_with_any_bytes_in_them",
    "NamesInFiles": "test_keys_of_1_to_64_bytes_with_any_bytes_in_them",
    "Swaps": "test_many_keys_in_batches_of_many_sizes",
    "MissingIsAnError": "test_what_was_never_put_is_not_there_and_is_no_error",
    "OnlyOnce": "test_a_key_put_again_counts_as_stored",
    "KeepsRemoved": "test_what_is_removed_is_gone_and_may_be_put_again",
    "RemovesOnlyWhatIsThere": "test_what_is_removed_is_gone_and_may_be_put_again",
    "AllOrNothing": "test_a_page_of_another_size_is_refused_and_the_others_are_served",
    "EndsTwice": "test_batches_that_are_out_together_all_end_each_once",
    "ForgetsEmpty": "test_a_batch_without_keys_ends_too",
    "SameTickets": "test_batches_that_are_out_together_all_end_each_once",
    "Raises": "test_a_key_that_does_not_fit_is_refused_and_the_others_are_served",
    "AcceptsAnySize": "test_a_page_of_another_size_is_refused_and_the_others_are_served",
    "ServesWhenClosed": "test_after_close_a_submission_ends_at_once_refused",
    "ChangesPages": "test_put_leaves_the_pages_as_they_are",
    "AnyOption": "test_open_refuses_what_it_does_not_understand",
    "OldestFirst": "test_when_full_the_least_recently_used_go",
    "Grows": "test_when_full_the_least_recently_used_go",
    "CountsPuts": "test_usage_counts_pages",
    "Leaks": "test_a_closed_store_leaves_no_descriptor_thread_or_process_behind",
    "LeavesAThread": "test_a_closed_store_leaves_no_descriptor_thread_or_process_behind",
    "DropsAtClose": "test_close_ends_what_was_submitted",
    "ForgetsAll": "test_a_store_opened_again_finds_its_pages",
}
SHARED = {name for name in TESTS if "open_together" in name or "processes_see" in name}
FULL = {name for name in TESTS if TESTS[name].__module__ == test_room.__name__}


@pytest.fixture(autouse=True)
def the_writer_finds_the_stores(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def impatient(monkeypatch):
    """Tests that give up soon on what never ends."""
    monkeypatch.setattr("commplane_conformance.pages.book.PATIENCE", 0.5)
    monkeypatch.setattr("commplane_conformance.pages.test_life.SETTLE", 0.2)


def run(name, test, folder, nbytes=0, wrong=b"x" * 65):
    options = {"path": "{tmp}/pages", **({"room": ROOM} if test in FULL else {})}
    spec = PageStoreSpec(name=name, api=(1, 0), factory=f"wrong_stores:{name}", capabilities={"durable", "evicts"})
    place = Place(StoreSubject(spec, "test", options), folder)
    call = TESTS[test]
    values = {"place": place, "nbytes": 4096, "wrong": wrong}
    wanted = inspect.signature(call).parameters
    try:
        if "store" in wanted:
            values["store"] = place.open()
        call(**{key: values[key] for key in wanted})
    finally:
        place.close()


@pytest.mark.parametrize("test", sorted(set(TESTS) - SHARED))
def test_an_honest_store_passes(tmp_path, test):
    run("Honest", test, tmp_path)


@pytest.mark.parametrize("name", CAUGHT)
def test_a_wrong_store_is_found(tmp_path, impatient, name):
    with pytest.raises((AssertionError, KeyError, OSError, pytest.fail.Exception)):
        run(name, CAUGHT[name], tmp_path)


def test_every_wrong_store_is_tried():
    wrong = {
        name for name, kind in vars(wrong_stores).items() if isinstance(kind, type) and issubclass(kind, wrong_stores.Honest)
    }
    assert wrong - {"Honest"} == set(CAUGHT)
