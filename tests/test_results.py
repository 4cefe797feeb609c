"""docs/results: what lies there was made with the commands that its README gives."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from commplane.cli import bench, launch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "results"
README = (FOLDER / "README.md").read_text()
COMMANDS = re.findall(r"^(?:python tests/gpu/gpu_mps\.py \d+ )?commplane ((?:bench|run) .*)$", README, re.MULTILINE)
# Of scripts under packages/*/benchmarks, for what wants more than our wheels.
SCRIPTS: dict[str, str] = {
    Path(name).name: command
    for command, name in re.findall(r"^(python packages/\S+\.py .*--json (docs/results/[\w-]+\.json).*)$", README, re.MULTILINE)
}
# Of the tool that measures a machine whole: what it wrote of those machines that there were.
benches = runpy.run_path(str(ROOT / "tools" / "gpu_results.py"))["benches"]
MACHINES = {
    name: f"commplane {shlex.join(arguments)}"
    for ranks in (2, 4, 8)
    for shared in (False, True)
    for name, arguments in benches(ranks, shared).items()
    if (FOLDER / name).exists()
}


def options(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Of `commplane bench`, or of the script that `commplane run` starts, by its function `arguments`."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    bench.add_commands(commands)
    launch.add_commands(commands)
    made = parser.parse_args(shlex.split(command))
    if "script" not in made:
        bench.check(made)
        return made
    script = ROOT / made.script
    monkeypatch.syspath_prepend(str(script.parent))  # what lies beside it
    of_script: argparse.Namespace = runpy.run_path(str(script), run_name="script")["arguments"](made.arguments)
    return of_script


def written(command: str) -> list[str]:
    """The files that a command names."""
    words = shlex.split(command)
    return [word for option, word in pairwise(words) if option in ("--json", "--plot")]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_one_that_is_taken_and_writes_here(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--plot" in command:
        pytest.importorskip("matplotlib", reason="wants matplotlib: pip install commplane[plot]")
    monkeypatch.chdir(ROOT)
    made = options(command, monkeypatch)
    assert [str(path) for path in (made.json, getattr(made, "plot", None)) if path is not None] == written(command)
    assert {Path(name).parent for name in written(command)} == {Path("docs/results")}


@pytest.mark.parametrize("command", MACHINES.values())
def test_what_measured_a_machine_whole_is_taken(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = options(command.removeprefix("commplane "), monkeypatch)
    assert [made.device, made.dtypes, str(made.json)] == ["cuda", ["bfloat16"], *written(command)]


def test_the_table_names_exactly_the_files_that_the_commands_write() -> None:
    named = {f"docs/results/{name}" for name in re.findall(r"`([\w-]+\.(?:json|png))`", README)}
    files = [name for command in COMMANDS for name in written(command)] + [
        f"docs/results/{name}" for name in {**SCRIPTS, **MACHINES}
    ]
    assert sorted(files) == sorted(named)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_every_file_was_made_with_its_command() -> None:
    commands = {Path(name).name: f"commplane {command}" for command in COMMANDS for name in written(command)}
    commands |= SCRIPTS | MACHINES
    there = {path.name for path in FOLDER.iterdir() if path.suffix not in {".md", ".txt"}}
    assert there <= commands.keys()
    for name in there:
        result = FOLDER / f"{Path(name).stem}.json"
        assert result.exists(), f"{name} has no figures beside it"
        found = json.loads(result.read_text())
        assert found["machine"]["command"] == commands[name]
        assert found["rows"]


def test_every_text_was_printed_by_its_command_and_has_no_failure() -> None:
    commands = dict(re.findall(r"^(python .*) > docs/results/([\w-]+\.txt)$", README, re.MULTILINE))
    there = {path.name: path.read_text() for path in FOLDER.glob("*.txt")}
    assert set(there) == set(commands.values())
    for command, name in commands.items():
        machine, made_with, *rest = there[name].splitlines()
        assert "GPU" in machine or "NVIDIA" in machine
        assert made_with == f"# {command}"
        assert rest[-1] == "all well"
