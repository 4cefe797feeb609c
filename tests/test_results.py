"""docs/results: what lies there was made with the commands that its README gives."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from commplane.cli import bench

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "results"
README = (FOLDER / "README.md").read_text()
COMMANDS = re.findall(r"^commplane (bench .*)$", README, re.MULTILINE)
# Of scripts under packages/*/benchmarks, for what wants more than our wheels.
SCRIPTS: dict[str, str] = {
    Path(name).name: command
    for command, name in re.findall(r"^(python packages/\S+\.py .*--json (docs/results/[\w-]+\.json).*)$", README, re.MULTILINE)
}


def options(command: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_commands(parser.add_subparsers())
    return parser.parse_args(shlex.split(command))


def written(command: str) -> list[str]:
    made = options(command)
    return [str(path) for path in (made.json, made.plot) if path is not None]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_one_that_bench_takes_and_writes_here(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="drawing wants the extra commplane[plot]")
    monkeypatch.chdir(ROOT)
    bench.check(options(command))
    assert {Path(name).parent for name in written(command)} == {Path("docs/results")}


def test_the_table_names_exactly_the_files_that_the_commands_write() -> None:
    named = {f"docs/results/{name}" for name in re.findall(r"`([\w-]+\.(?:json|png))`", README)}
    files = [name for command in COMMANDS for name in written(command)] + [f"docs/results/{name}" for name in SCRIPTS]
    assert sorted(files) == sorted(named)


def test_every_file_was_made_with_its_command() -> None:
    commands = {Path(name).name: f"commplane {command}" for command in COMMANDS for name in written(command)} | SCRIPTS
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
