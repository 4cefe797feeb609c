"""The file of timings: written, read, compared over the ranks, and left alone where it is of another group."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import fused
import pytest

from commplane import errors
from commplane.cli import main
from commplane.runtime import Plane
from commplane.runtime.tuning import Tuning, facts_of
from commplane.select import Curve, Timings
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(60)

NORM = ("all_reduce_rms_norm", None, "float32", False)
TIMINGS = Timings((Curve(*NORM, "fused", ((512, 50.0),)), Curve(*NORM, "composed:torch", ((512, 5.0),))))


def run(function: Any, config: Any) -> list[Any]:
    return run_threads(2, function, plugins=lambda _rank: fused.host(), config=config)


def written(path: Path, **changes: Any) -> Tuning:
    """A file for this machine, with some facts changed."""

    def rank_main(plane: Plane) -> dict[str, Any]:
        comm = plane.communicator("tp")
        return facts_of(comm.plan, plane.facts, comm.device)

    facts = run(rank_main, lambda _rank: {"timeout": 20})[0]
    out = Tuning({**facts, **changes}, TIMINGS, str(path))
    out.write(str(path))
    return out


def chosen(plane: Plane) -> tuple[Any, bool]:
    comm = plane.communicator("tp")
    return comm.plan.explain("all_reduce_rms_norm", nbytes=512).chosen, comm.plan.timings is not None


def test_what_is_written_is_read_and_followed_on_every_rank_wherever_it_lies(tmp_path: Path) -> None:
    tuning = written(tmp_path / "0.json")
    assert Tuning.read(str(tmp_path / "0.json")) == tuning
    (tmp_path / "1.json").write_bytes((tmp_path / "0.json").read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "1.json"]
    found = run(chosen, lambda rank: {"timeout": 20, "tuning": tmp_path / f"{rank}.json"})
    assert found == [("composed of all_reduce by torch and torch", True)] * 2


def test_a_file_of_another_group_is_not_used_and_says_so_once(tmp_path: Path) -> None:
    written(tmp_path / "t.json", ranks=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(chosen, lambda _rank: {"timeout": 20, "tuning": str(tmp_path / "t.json")})
    assert found == [("fused", False)] * 2
    texts = [str(w.message) for w in caught if "tuning file" in str(w.message)]
    assert len(texts) == 1 and "ranks was 8, here it is 2; write one with commplane tune" in texts[0]


def test_files_that_differ_stop_every_rank(tmp_path: Path) -> None:
    tuning = written(tmp_path / "0.json")
    replace(tuning, timings=Timings(TIMINGS.curves[:1])).write(str(tmp_path / "1.json"))
    found = run(chosen, lambda rank: {"timeout": 20, "tuning": str(tmp_path / f"{rank}.json")})
    assert all(
        isinstance(e, errors.AgreementError) and "ranks disagree on settings" in str(e) and "tuning=" in str(e) for e in found
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("[]", "wants version 1 and facts"),
        (json.dumps({"version": 1, "facts": {}, "timings": [{"collective": "all_reduce"}]}), "is broken: a curve wants"),
    ],
)
def test_a_broken_file_is_a_configuration_error(tmp_path: Path, text: str | None, wanted: str) -> None:
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(errors.ConfigError, match=wanted):
        Tuning.read(str(path))


def test_the_command_writes_a_file_that_the_next_run_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    monkeypatch.setenv("COMMPLANE_BACKENDS", "torch")
    sizes = ["--sizes", "8K", "--hidden", "256", "--dtypes", "fp32", "--device", "cpu"]
    assert main(["tune", "--collectives", "all_reduce_rms_norm", *sizes, "--out", str(path)]) == 0
    assert [c.candidate for c in Tuning.read(str(path)).timings.curves] == ["composed:torch"]
    monkeypatch.setenv("COMMPLANE_TUNING", str(path))
    monkeypatch.setenv("COMMPLANE_DEVICE", "cpu")
    capfd.readouterr()
    assert main(["explain", "all_reduce_rms_norm", "--bytes", "8K"]) == 0
    assert "composed of all_reduce by torch and torch, " in capfd.readouterr().out
