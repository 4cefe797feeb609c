"""The conformance kit: its tests cite clauses that exist, and core's own backend and custom_ar pass it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

KIT = ROOT / "packages" / "conformance" / "src" / "commplane_conformance"
MODULES = sorted((KIT / "comm").glob("test_*.py"))
CLAUSES = set(re.findall(r"^\*\*(S\d+)\*\*", (ROOT / "docs" / "semantics.md").read_text(), re.MULTILINE))


def cited(module: Path) -> dict[str, set[str]]:
    """The clauses that each test of a module cites."""
    out = {}
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and getattr(d.func, "id", "") == "clause"]
            out[node.name] = {argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)}
    return out


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_every_test_of_the_kit_cites_clauses_that_exist(module: Path) -> None:
    for name, clauses in cited(module).items():
        assert clauses, f"{name} cites no clause"
        assert clauses <= CLAUSES, f"{name} cites {clauses - CLAUSES}, which docs/semantics.md does not have"


def test_the_page_of_the_kit_names_its_files() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "packages" / "conformance" / "README.md").read_text()))
    assert named == {m.name for m in MODULES}


# All of it with 2, 3 and 4 ranks is `nox -s conformance`; what needs more than two ranks is here too. Torch's are long.
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("backend", "ranks", "only"),
    [
        pytest.param("torch", "2", [], marks=pytest.mark.long),
        ("custom_ar", "2", []),
        pytest.param("torch", "4", ["-k", "groups"], marks=pytest.mark.long),
        pytest.param("custom_ar", "3,4", ["-k", "groups"], marks=pytest.mark.long),
        pytest.param("hierarchical", "4", ["--commplane-hosts", "2"], marks=pytest.mark.long),
    ],
)
def test_our_own_backends_pass_from_an_empty_folder(tmp_path: Path, backend: str, ranks: str, only: list[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    report = tmp_path / "report.json"
    options = ["--commplane-backend", backend, "--commplane-ranks", ranks, "--commplane-report", str(report), *only]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "commplane_conformance", *options]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(report.read_text())
    assert set(said["summary"]) <= {"passed", "skipped", *(["not run"] if only else [])} and said["summary"]["passed"]
    if not only:
        assert said["unexercised"] == []
    assert list(empty.iterdir()) == []
