"""The template renders projects that prove themselves at once, and docs/write-a-backend.md shows them as they are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from copier import run_copy
from repository import ROOT

PAGE = (ROOT / "docs" / "write-a-backend.md").read_text()
BLOCKS = re.findall(r"^```\w+ title=(\w+)/(\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(COPY,) = re.findall(r"^copier (copy .*) path/to/commplane (\S+)$", PAGE, re.MULTILINE)
(UPDATE,) = re.findall(r"`copier (update .*?)`", PAGE)
ANSWERS = {**dict(re.findall(r"--data (\w+)=(\S+)", COPY[0])), "author": "Acme Inc."}
KINDS = ("pure", "native")

pytestmark = pytest.mark.timeout(170)


def command(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    out = subprocess.run(arguments, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=160)
    assert out.returncode == 0, f"{out.stdout[-8000:]}\n{out.stderr[-8000:]}"
    return out.stdout


def template(folder: Path) -> Path:
    """What copier reads, without the repository around it, of which it would take the last commit."""
    shutil.copytree(ROOT / "template", folder / "template")
    for name in ("copier.yml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def render(source: Path, target: Path, **answers: str) -> Path:
    run_copy(str(source), target, data={**ANSWERS, **answers}, defaults=True, quiet=True)
    return target


@dataclass(frozen=True)
class Project:
    """A rendered project, its wheel installed in a folder of its own, and the environment of a Python that finds it."""

    folder: Path
    env: Mapping[str, str]


@pytest.fixture(scope="module", params=KINDS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Project:
    scratch = tmp_path_factory.mktemp(request.param)
    folder = render(template(scratch), scratch / "project", kind=request.param)
    pip, site = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"), scratch / "site"
    # The native kind is built isolated: scikit-build-core then brings CMake where there is none.
    isolation = ["--no-build-isolation"] if request.param == "pure" else []
    command(*pip, "wheel", "--no-deps", *isolation, "--wheel-dir", "wheel", str(folder), cwd=scratch)
    (wheel,) = (scratch / "wheel").iterdir()
    command(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=scratch)
    assert wheel.stem.endswith("py3-none-any") == (request.param == "pure")
    assert "-py3-none-" in wheel.name
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    return Project(folder, {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


def test_a_rendered_project_passes_its_own_tests(project: Project) -> None:
    out = command(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project.folder, env=project.env)
    assert re.search(r"^\d+ passed in", out, re.MULTILINE), out


# With 2, 3 and 4 ranks it is `nox -s template`.
@pytest.mark.long
def test_a_rendered_project_passes_the_conformance_kit(project: Project, tmp_path: Path) -> None:
    kit = ["--pyargs", "commplane_conformance", "--commplane-backend", "acme", "--commplane-ranks", "2"]
    kit += ["--commplane-expected-failures", str(project.folder / "conformance-expected-failures.txt")]
    kit += ["--commplane-report", "report.json"]
    command(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *kit, cwd=tmp_path, env=project.env)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["summary"]) == {"passed", "skipped"} and report["summary"]["passed"] > 80
    assert report["unexercised"] == []


def test_what_a_wheel_of_the_template_declares_loads_no_torch(project: Project, tmp_path: Path) -> None:
    code = "import sys, commplane_acme.plugin as p; p.commplane_register_comm_backends(); sys.exit('torch' in sys.modules)"
    command(sys.executable, "-c", code, cwd=tmp_path, env=project.env)


def test_every_block_of_the_page_is_part_of_the_project_that_is_proved(tmp_path: Path) -> None:
    source = template(tmp_path)
    folders = {kind: render(source, tmp_path / kind, kind=kind) for kind in KINDS}
    assert {kind for kind, _, _ in BLOCKS} == set(KINDS)
    for kind, name, text in BLOCKS:
        lines, shown = (folders[kind] / name).read_text().splitlines(), text.splitlines()
        found = any(lines[i : i + len(shown)] == shown for i in range(len(lines)))
        assert found, f"docs/write-a-backend.md shows lines of {name} that the {kind} project does not have:\n{text}"
    assert {Path(name).name for kind, name, _ in BLOCKS if name.endswith(".py")} == {"plugin.py", "probe.py", "backend.py"}


def test_every_file_that_the_page_names_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


NONSENSE: list[dict[str, Any]] = [
    {"backend_name": "9lives"},
    {"backend_name": "my-backend"},
    {"backend_name": "torch"},
    {"import_name": "commplane-acme"},
    {"import_name": "2fast"},
    {"import_name": "class"},
    {"import_name": "commplane"},
    {"dist_name": "-acme"},
    {"dist_name": "acme wheel"},
    {"kind": "rust"},
    {"licence": "none"},
    {"author": 'say "hello"'},
    {"author": ""},
    {"version": "one"},
]


@pytest.mark.parametrize("answers", NONSENSE, ids=lambda a: "-".join(*a.items()) or "empty")
def test_the_questions_refuse_nonsense(answers: dict[str, Any], tmp_path: Path) -> None:
    (name,) = answers
    with pytest.raises(ValueError, match=name):
        render(template(tmp_path), tmp_path / "project", **answers)
    assert not (tmp_path / "project" / "pyproject.toml").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_other_answers_reach_every_file(kind: str, tmp_path: Path) -> None:
    answers = {"backend_name": "rdma", "dist_name": "example-rdma", "import_name": "rdma_ranks", "version": "2.0.0rc1"}
    folder = render(template(tmp_path), tmp_path / "project", kind=kind, licence="MIT", **answers)
    text = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert not [name for name, content in text.items() if "acme" in (name + content).replace("Acme Inc.", "")]
    assert "src/rdma_ranks/plugin.py" in text and 'rdma = "rdma_ranks.plugin"' in text["pyproject.toml"]
    assert 'version = "2.0.0rc1"' in text["pyproject.toml"] and 'license = "MIT"' in text["pyproject.toml"]
    assert text["LICENSE"].startswith("Copyright (c) Acme Inc.\n\nPermission is hereby granted")
    assert ("CMakeLists.txt" in text) == (kind == "native") == ("csrc/all_reduce.c" in text)


def test_the_commands_of_the_page_make_a_project_and_bring_what_changed_later(tmp_path: Path) -> None:
    def git(where: Path, *arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command("git", *who, *arguments, cwd=where)

    def copier(where: Path, said: str, *arguments: str) -> None:
        command(sys.executable, "-m", "copier", *said.split(), "--defaults", "--quiet", *arguments, cwd=where)

    (tmp_path / "commplane").mkdir()
    source, project = template(tmp_path / "commplane"), tmp_path / COPY[1]
    git(source, "init", "-q")
    git(source, "add", ".")
    git(source, "commit", "-qm", "first")
    git(source, "tag", "core-v0.1.0")  # as tags of this repository are
    copier(tmp_path, COPY[0], "--data", f"author={ANSWERS['author']}", str(source), project.name)
    (project / "CHANGELOG.md").write_text((project / "CHANGELOG.md").read_text() + "- Written by hand.\n")
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "first")
    readme = source / "template" / "README.md.jinja"
    readme.write_text(readme.read_text() + "\nLater.\n")
    git(source, "commit", "-qam", "later")
    copier(project, UPDATE)
    assert (project / "README.md").read_text().endswith("\nLater.\n")
    assert (project / "CHANGELOG.md").read_text().endswith("- Written by hand.\n")
