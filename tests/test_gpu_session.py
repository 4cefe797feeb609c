"""tools/gpu_tests.py: which parts a machine with GPUs runs, and what is said of those that it cannot."""

from __future__ import annotations

import importlib.util
import runpy
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "gpu_tests.py"


def with_modules(monkeypatch: pytest.MonkeyPatch, *missing: str) -> dict[str, Any]:
    """What the tool defines, on a machine where all modules are installed but `missing`."""

    def find(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name in missing else ModuleSpec(name, None)

    tool = runpy.run_path(str(TOOL), run_name="tool")
    monkeypatch.setattr(importlib.util, "find_spec", find)
    return tool


def test_two_gpus_run_the_tests_and_the_kit_of_flashinfer_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = with_modules(monkeypatch)
    parts = {name: command for name, command, _ in tool["parts"](["-q"], 2)}
    assert {"tests, comm-flashinfer", "kit, flashinfer", "tests, comm-custom-ar", "kit, custom_ar", "kit, torch"} <= set(parts)
    modules = {Path(word).name for word in parts["tests, comm-flashinfer"] if word.endswith(".py")}
    assert modules == {path.name for path in (ROOT / "packages" / "comm-flashinfer" / "tests" / "gpu").glob("test_*.py")}
    assert "--commplane-ranks=2" in parts["kit, flashinfer"]
    assert tool["left_out"]() == []


@pytest.mark.parametrize("missing", ["flashinfer", "commplane_flashinfer"])
def test_without_it_both_are_left_out_and_that_is_said(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    tool = with_modules(monkeypatch, missing)
    names = [name for name, _, _ in tool["parts"]([], 2)]
    assert "kit, custom_ar" in names and not any("flashinfer" in name for name in names)
    assert tool["left_out"]() == [f"comm-flashinfer: its tests and the kit for it were not run, {missing} is not installed"]


def test_one_gpu_runs_the_tests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = with_modules(monkeypatch)
    names = [name for name, _, _ in tool["parts"]([], 1)]
    assert "tests, comm-flashinfer" in names and all(name.startswith("tests, ") for name in names)
