"""`commplane trace`: what it reads, prints, writes and exits with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flights import call, group, write

from commplane.cli import main

RANKS = range(3)


def healthy(folder: Path, **changes: Any) -> None:
    for r in RANKS:
        write(folder, r, [group([call(1), call(2)])], **changes)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMMPLANE_FLIGHT_DIR", "COMMPLANE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def test_a_job_with_nothing_wrong_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(tmp_path)
    assert main(["trace", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "job job-a, 3 ranks, dumps of ranks 0, 1, 2"
    assert "nothing wrong found" in out
    assert f"trace: {tmp_path / 'trace-job-a.json'}" in out
    assert json.loads((tmp_path / "trace-job-a.json").read_text())["traceEvents"]


def test_something_found_exits_with_3_and_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for r in (0, 2):
        write(tmp_path, r, [group([call(1), call(2, start=10, took=None)])], ended=[1])
    assert main(["trace", str(tmp_path)]) == 3
    found = capsys.readouterr().out.partition("\nfound\n")[2]
    assert "rank 1 did not come to #2 all_reduce(sum, float32, 64 bytes); ranks 0, 2 have been in it for up to 90 s" in found


def test_the_report_is_printed_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, [group([call(1)])])
    output = tmp_path / "elsewhere.json"
    assert main(["trace", str(tmp_path), "--json", "--output", str(output)]) == 3
    said = json.loads(capsys.readouterr().out)
    assert (said["job"], said["world_size"], said["without_dump"]) == ("job-a", 3, [1, 2])
    assert [f["kind"] for f in said["findings"]] == ["no_dump", "no_dump"]
    assert said["trace"] == str(output) and output.exists()
    assert not (tmp_path / "trace-job-a.json").exists()


def test_of_several_jobs_the_one_that_dumped_last_is_read_unless_another_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy(tmp_path, job="job-b", wall=9000)
    healthy(tmp_path, job="job-c", wall=8000)
    assert main(["trace", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("job job-b,")
    assert main(["trace", str(tmp_path), "--job", "job-c"]) == 0
    assert capsys.readouterr().out.startswith("job job-c,")
    assert main(["trace", str(tmp_path), "--job", "job-d"]) == 1
    assert f"no flight records of job 'job-d' in '{tmp_path}': found job-b, job-c" in capsys.readouterr().err


def test_files_that_are_no_dumps_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(tmp_path)
    cut = tmp_path / "flight-job-a-rank0-1.json"
    cut.write_text(next(tmp_path.glob("flight-*")).read_text()[:100])
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    (tmp_path / "notes.txt").write_text("not ours")
    assert main(["trace", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert f"skipped {cut.name}: not whole, or no JSON" in err
    assert "skipped other.json: not a dump of flight records" in err
    assert "skipped bytes.json: " in err and "notes.txt" not in err
    assert main(["trace", str(tmp_path)]) == 0
    assert "trace-job-a.json" not in capsys.readouterr().err  # its own output is known to it


def test_of_two_files_of_one_rank_the_later_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(tmp_path)
    older = write(tmp_path, 1, [group([call(1, start=5, took=None)])], at=50)
    older = older.rename(tmp_path / "flight-job-a-rank1-7.json")
    write(tmp_path, 1, [group([call(1), call(2)])])
    assert main(["trace", str(tmp_path)]) == 0
    assert f"skipped {older.name}: rank 1 has a later one" in capsys.readouterr().err


@pytest.mark.parametrize("holds", ["nothing", "a foreign file"])
def test_a_folder_without_dumps_is_an_error_that_says_what_it_holds(
    holds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if holds == "a foreign file":
        (tmp_path / "other.json").write_text("{}")
    assert main(["trace", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    wanted = "no JSON file" if holds == "nothing" else "other.json: not a dump of flight records"
    assert f"wanted flight records (flight-*.json) in '{tmp_path}', found {wanted}" in err
    assert "SIGUSR1" in err and "COMMPLANE_FLIGHT_DIR" in err


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_what_is_no_folder_is_an_error(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x"
    if kind == "a file":
        path.write_text("")
    assert main(["trace", str(path)]) == 1
    assert f"folder of flight records '{path}' cannot be read" in capsys.readouterr().err


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    healthy(tmp_path)
    assert main(["trace", str(tmp_path), "--output", str(tmp_path / "no" / "t.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_without_a_folder_the_one_of_the_settings_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy(tmp_path)
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path))
    assert main(["trace"]) == 0
    assert "job job-a" in capsys.readouterr().out
