"""The page of errors has every class, under its parent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from commplane import errors


def page() -> str:
    packages = next(p for p in Path(__file__).resolve().parents if p.name == "packages")
    return (packages.parent / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """The text under each heading of a class."""
    parts = re.split(r"^### `(\w+)`\n", page(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_page_holds_every_class_and_no_other() -> None:
    assert sorted(sections()) == sorted(errors.__all__)


@pytest.mark.parametrize("name", errors.__all__)
def test_a_class_stands_under_its_parent_and_is_explained(name: str) -> None:
    parent = getattr(errors, name).__bases__[0].__name__
    text = sections()[name].strip()
    assert text.startswith(f"Parent: `{parent}`.")
    assert len(text) > 150


@pytest.mark.parametrize("name", errors.__all__)
def test_the_tree_names_the_foreign_parents(name: str) -> None:
    tree = page().partition("```text")[2].partition("```")[0]
    (line,) = [line for line in tree.splitlines() if re.search(rf"\b{name}\b", line)]
    for other in getattr(errors, name).__bases__[1:]:
        assert other.__name__ in line
