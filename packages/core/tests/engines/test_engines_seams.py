"""An engine's source is read, and nothing of it imported: what is hooked has to be as it was looked at."""

from __future__ import annotations

import ast
import functools
import sys
from contextlib import contextmanager

import pytest

from commplane.engines import Engine, Seam, calls, lost

SOURCE = """
import nothing_that_is_installed

try:
    class Group:
        def __init__(self, ranks, *, name, **more):
            self.unique_name, self.ranks = name, ranks

        @decorated
        def all_reduce(self, x, /):
            def destroy(self, now): ...
            return x

        if True:
            async def destroy(self, *rest): ...
except ImportError:
    pass


def capture(stream=None): ...
def capture(stream=None, pool=None): ...
"""


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """`madeup`, an engine on the path: ``engine(seams..., source=, version=)`` writes it; what an adapter says of it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(*seams, source=SOURCE, version="1.4"):
        (tmp_path / "madeup").mkdir(exist_ok=True)
        (tmp_path / "madeup" / "__init__.py").write_text("raise RuntimeError('the engine was imported')")
        (tmp_path / "madeup" / "groups.py").write_text(source)
        metadata = tmp_path / "madeup-1.4.dist-info"
        metadata.mkdir(exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: madeup\nVersion: {version}\n")
        return Engine("madeup", "commplane", ">=1.4,<2", seams, "start without it", "MADEUP_REPEATABLE").problem()

    return written


def seam(name, *parameters, **more):
    return Seam("madeup.groups", name, parameters, **more)


def test_what_is_as_it_was_is_no_problem_and_the_engine_is_not_imported(engine):
    assert (
        engine(
            seam("Group.__init__", "self", "ranks", "name", "**more", sets=("unique_name", "ranks")),
            seam("Group.__init__", "self", "name", among=True),
            seam("Group.all_reduce", "self", "x"),
            seam("Group.destroy", "self", "*rest"),
            seam("capture", "stream", "pool"),  # the last definition is the one that counts
        )
        is None
    )
    assert "madeup" not in sys.modules


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (seam("Group.all_reduce", "self", "x", "op"), "found Group.all_reduce(self, x)"),
        (seam("Group.destroy", "self"), "found Group.destroy(self, *rest)"),
        (seam("Group.gone", "self"), "wanted Group.gone(self) in madeup.groups, found nothing of that name"),
        (seam("Other.all_reduce", "self"), "found nothing of that name"),
        (seam("Group.__init__", "self", "backend", among=True), "wanted Group.__init__(self, backend, ...) in madeup.groups"),
        (seam("Group.__init__", "self", sets=("device",), among=True), "to set self.device, found that it does not"),
        (seam("capture", "stream"), "found capture(stream, pool)"),
        (Seam("madeup.none", "f", ()), "wanted f() in madeup.none, found no source of that module"),
    ],
    ids=["one-less", "one-more", "no-method", "no-class", "not-among", "not-set", "redefined", "no-module"],
)
def test_a_difference_is_told_as_wanted_and_found(engine, wanted, found):
    text = engine(wanted)
    assert text is not None and found in text and text.startswith("commplane ") and text.endswith("or start without it")


def test_a_source_that_this_python_cannot_read_is_a_difference_and_no_crash(engine):
    text = engine(seam("f"), source="def f(:\n")
    assert text is not None and "wanted f() in madeup.groups, found a source that this Python cannot read (" in text


@pytest.mark.parametrize("version", ["1.3.9", "2.0", "unknown"])
def test_another_version_is_a_difference_even_with_the_same_seams(engine, version):
    text = engine(seam("Group.all_reduce", "self", "x"), version=version)
    assert text is not None and f"wanted madeup>=1.4,<2, found {version}: install a commplane that" in text


def test_an_engine_that_is_not_there_is_one_difference_and_not_one_for_each_seam():
    engine = Engine("not-there-at-all", "commplane", ">=1", (seam("f"), seam("g")), "leave it out", "X")
    text = engine.problem()
    assert text is not None and "wanted not-there-at-all>=1, found none installed: install" in text and "madeup" not in text


def test_pure_comparison_of_one_seam():
    assert seam("f", "x").problem(ast.parse("def f(x): ...")) is None
    assert "found f(y)" in str(seam("f", "x").problem(ast.parse("def f(y): ...")))


def around(original, hook):
    @functools.wraps(original)
    def hooked(*args, **kwargs):
        return hook(original, *args, **kwargs)

    return hooked


class Hooked:
    @contextmanager
    def capture(self):
        yield

    def destroy(self):
        pass


def test_a_hook_is_found_under_those_of_others_and_a_decorator_of_the_engine_is_not_taken_for_one():
    def ours(original, self):
        original(self)

    def theirs(original, self):
        original(self)

    assert hasattr(Hooked.capture, "__wrapped__") and not calls(Hooked.capture, ours)
    assert calls(around(around(Hooked.capture, ours), theirs), ours) and not calls(around(Hooked.capture, theirs), ours)
    scope = type("Group", (Hooked,), {"destroy": around(Hooked.destroy, ours)})
    assert lost(scope, {"destroy": ours}) is None
    assert lost(scope, {"capture": ours, "destroy": ours, "gone": ours}) == (
        "wanted hooks on Group.capture, gone, found that they are not there"
    )
