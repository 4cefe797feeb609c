"""What is wrong with a plugin, as text: who, wanted, found, what to do, how to leave it out."""

from __future__ import annotations

import pytest

from commplane.errors import PluginCompatibilityError, PluginConflict, PluginError, PluginLoadError
from commplane.plugins import Kind, Mismatch, Problem, as_error

OLD = Problem(
    "mine",
    "mine from mine-dist 1.0",
    Kind.COMPATIBILITY,
    "wants other versions",
    (
        Mismatch("commplane>=2", "commplane 1.0", 'pip install "commplane>=2"'),
        Mismatch("dep>=3", "dep 2.0", "upgrade dep"),
    ),
    names=("mine_fast",),
)
BROKEN = Problem("other", "other from other-dist 2.0", Kind.LOAD, "ImportError: no libfoo", traceback="Traceback:\n  line 1\n")
CLASH = Problem("third", "third from third-dist 3.0", Kind.CONFLICT, "two distributions provide backend 'x'", names=("x",))
DENIED = Problem("fourth", "fourth from fourth-dist 4.0", Kind.DENIED, "left out by COMMPLANE_PLUGINS")


def test_an_incompatibility_lists_each_thing_wanted_and_found_and_each_fix() -> None:
    title, *rest = OLD.lines()
    assert title == "mine from mine-dist 1.0"
    assert [line.split() for line in rest] == [
        ["wanted", "commplane>=2", "found", "commplane", "1.0"],
        ["wanted", "dep>=3", "found", "dep", "2.0"],
        ["fix", "pip", "install", '"commplane>=2"'],
        ["fix", "upgrade", "dep"],
    ]


def test_a_fix_that_serves_two_mismatches_is_shown_once() -> None:
    problem = Problem("p", "p", Kind.COMPATIBILITY, "s", (Mismatch("a", "b", "upgrade"), Mismatch("c", "d", "upgrade")))
    assert sum("upgrade" in line for line in problem.lines()) == 1


def test_other_problems_are_one_line_with_their_summary() -> None:
    assert BROKEN.lines() == ["other from other-dist 2.0: ImportError: no libfoo"]


def test_a_problem_concerns_its_plugin_and_the_backends_that_are_lost_with_it() -> None:
    assert [OLD.concerns(name) for name in ("mine", "mine_fast", "other")] == [True, True, False]


@pytest.mark.parametrize(
    ("problem", "kind"),
    [(OLD, PluginCompatibilityError), (BROKEN, PluginLoadError), (CLASH, PluginConflict), (DENIED, PluginError)],
)
def test_the_class_of_the_error_follows_the_kind_of_the_problem(problem: Problem, kind: type[PluginError]) -> None:
    assert type(as_error([problem], 1, "1.0")) is kind


@pytest.mark.parametrize("problem", [OLD, BROKEN, CLASH, DENIED], ids=lambda p: p.kind.name)
def test_every_error_names_the_plugin_and_how_to_leave_it_out(problem: Problem) -> None:
    text = str(as_error([problem], 4, "1.0"))
    assert problem.title in text
    assert f"COMMPLANE_PLUGINS=-{problem.plugin} " in text
    assert "commplane plugins" in text
    assert text.startswith("1 of 4 plugins ")


def test_an_incompatibility_names_the_version_of_core() -> None:
    assert "cannot be used with commplane 1.0" in str(as_error([OLD], 1, "1.0"))


def test_a_load_failure_shows_its_traceback() -> None:
    assert "    Traceback:\n      line 1" in str(as_error([BROKEN], 1, "1.0"))


def test_problems_of_different_kinds_are_in_one_text_and_left_out_together() -> None:
    text = str(as_error([OLD, BROKEN, CLASH], 5, "1.0"))
    assert text.startswith("3 of 5 plugins cannot be used\n")
    assert all(p.title in text for p in (OLD, BROKEN, CLASH))
    assert "COMMPLANE_PLUGINS=-mine,-other,-third" in text


def test_a_plugin_with_two_problems_is_left_out_once() -> None:
    again = Problem("mine", "mine from mine-dist 1.0", Kind.COMPATIBILITY, "other API", (Mismatch("a", "b"),))
    assert "COMMPLANE_PLUGINS=-mine " in str(as_error([OLD, again], 1, "1.0"))


def test_two_problems_of_one_plugin_are_not_counted_as_two_plugins() -> None:
    again = Problem("mine", "mine from mine-dist 1.0", Kind.COMPATIBILITY, "other API", (Mismatch("a", "b"),))
    assert str(as_error([OLD, again], 3, "1.0")).startswith("1 of 3 plugins ")
