"""The hook reference is held to the code."""

from __future__ import annotations

import inspect

import pytest
from repository import ROOT

from commplane import hookspecs

PAGE = ROOT / "docs" / "reference" / "hooks.md"


@pytest.mark.parametrize("name", hookspecs.__all__)
def test_the_reference_shows_every_hook_with_its_exact_signature(name: str) -> None:
    signature = str(inspect.signature(getattr(hookspecs, name))).replace("'", "")
    assert f"{name}{signature}" in PAGE.read_text(encoding="utf-8")
