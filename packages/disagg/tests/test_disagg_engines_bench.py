"""The bench of engines measures what it says, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commplane_disagg.cli import main


@pytest.mark.timeout(150)
def test_the_bench_tells_speeds_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases, out = "memcpy;plain socket;shm;tcp", tmp_path / "out.json"
    assert main(["bench", "engines", "--mib", "2", "--rounds", "2", "--cases", cases, "--json", str(out)]) == 0
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert all(case in shown for case in cases.split(";"))
    assert list(found["cases"]) == cases.split(";")
    assert all(value > 0 for row in found["cases"].values() for value in row.values())
    assert [(row["of"], row["to"]) for row in found["ratios"]] == [("shm", "memcpy"), ("tcp", "plain socket")]


@pytest.mark.timeout(60)
def test_an_unknown_case_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engines", "--cases", "carrier pigeon"]) == 1
    assert "no case carrier pigeon; there are memcpy" in capsys.readouterr().err
