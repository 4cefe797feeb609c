"""Where dumps go, what is in them, and that a failure to write one never becomes a failure of the caller."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from commplane.api import BuildContext, CommBackend, FlightRecord, GroupKey
from commplane.errors import CommplaneWarning, PeerError
from commplane.flight import FlightRecorder, Folder, GroupFlight, new_job
from commplane.flight.folder import KEPT
from commplane.flight.read import parse

KEY = GroupKey((0, 1), "cpu", "tp")


class Keeper(CommBackend):
    """Says what it is told to say."""

    keeps_flight_records = True

    def __init__(self, *seqs: int) -> None:
        self.seqs = seqs

    def open(self, context: BuildContext) -> None:
        raise AssertionError("a recorder opens nothing")

    def close(self) -> None:
        raise AssertionError("a recorder closes nothing")

    def flight_records(self) -> list[FlightRecord]:
        return [FlightRecord(n, "all_reduce", "sum", "float32", 64, "done", n, n + 1) for n in self.seqs]


def recorder(folder: Folder | Path | str, job: str = "job", length: int = 8, ended: tuple[int, ...] = ()) -> FlightRecorder:
    where = folder if isinstance(folder, Folder) else Folder(str(folder))
    return FlightRecorder(job, 1, 2, length, where, {"commplane": "0"}, lambda: ended)


def group(of: FlightRecorder, *seqs: int, instance: int = 1) -> GroupFlight:
    return of.group(KEY, instance, 1, "plan", {"keeper": Keeper(*seqs)})


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_dump_is_one_file_named_by_job_rank_and_process(tmp_path: Path) -> None:
    plane = recorder(tmp_path, ended=(0,))
    group(plane, 1, 2)
    path = plane.dump("on request")
    assert path == tmp_path / f"flight-job-rank1-{os.getpid()}.json"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert json.loads(path.read_text())["communicators"][0]["backends"] == ["keeper"]
    said = parse(path.name, path.read_text())
    assert (said.job, said.rank, said.world_size, said.pid) == ("job", 1, 2, os.getpid())
    assert (said.reason, said.ended, said.versions) == ("on request", (0,), {"commplane": "0"})
    assert [(g.key, g.instance, g.state, g.fault) for g in said.groups] == [(KEY, 1, "open", "")]
    assert [r.seq for r in said.groups[0].records["keeper"]] == [1, 2]


def test_the_clocks_of_a_dump_are_read_at_one_moment(tmp_path: Path) -> None:
    before = (time.monotonic_ns(), time.time_ns())
    said = parse("f", recorder(tmp_path).dump("now").read_text())
    after = (time.monotonic_ns(), time.time_ns())
    assert before[0] <= said.monotonic_ns <= after[0] and before[1] <= said.wall_ns <= after[1]


def test_a_later_dump_takes_the_place_of_the_earlier_and_names_its_reason(tmp_path: Path) -> None:
    plane = recorder(tmp_path)
    assert plane.dump("first") == plane.dump("second")
    assert len(list(tmp_path.iterdir())) == 1
    said = parse("f", plane.dump("third").read_text())
    assert (said.reason, said.earlier) == ("third", ("first", "second"))


def test_dumps_are_for_this_user_only(temporary: Path) -> None:
    path = recorder(Folder(None)).dump("now")
    assert path.parent == temporary / f"commplane-flight-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_default_folder_that_others_could_read_is_closed_to_them(temporary: Path) -> None:
    folder = Folder(None)
    folder.path.mkdir(mode=0o777)
    folder.path.chmod(0o777)
    recorder(folder).dump("now")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_a_default_folder_of_somebody_else_is_refused(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(None)
    folder.path.mkdir(mode=0o700)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(PermissionError, match=f"of user {mine + 1}, found one of user {mine}.*COMMPLANE_FLIGHT_DIR"):
        recorder(folder).dump("now")
    assert list(folder.path.iterdir()) == []


def test_a_link_in_the_place_of_the_default_folder_is_refused(temporary: Path) -> None:
    (temporary / "elsewhere").mkdir()
    folder = Folder(None)
    folder.path.symlink_to(temporary / "elsewhere")
    with pytest.raises(PermissionError, match="or a link"):
        recorder(folder).dump("now")
    assert list((temporary / "elsewhere").iterdir()) == []


def test_a_folder_that_was_named_is_made_with_its_parents_and_kept_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("a/b")
    monkeypatch.chdir("/")
    assert recorder(folder).dump("now").parent == tmp_path / "a" / "b"


def aged(folder: Path, name: str, seconds: float) -> Path:
    path = folder / name
    path.write_text("{}")
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_the_newest_dumps_stay_in_the_default_folder(temporary: Path) -> None:
    folder = Folder(None)
    folder.path.mkdir(mode=0o700)
    old = [aged(folder.path, f"flight-other-rank{n}-1.json", 1000 + n) for n in range(KEPT + 5)]
    mine = aged(folder.path, "flight-job-rank9-1.json", 9999)
    foreign = aged(folder.path, "notes.json", 9999)
    begun = aged(folder.path, ".flight-other-rank0-1.json.ab.part", 9999)
    in_hand = aged(folder.path, ".flight-other-rank1-1.json.cd.part", 1)
    path = recorder(folder).dump("now")
    left = set(folder.path.iterdir())
    assert {path, mine, foreign, in_hand} <= left and begun not in left
    assert left & set(old) == set(old[: KEPT - 1])  # one place is the new dump's


def test_nothing_is_removed_from_a_folder_that_was_named(tmp_path: Path) -> None:
    old = {aged(tmp_path, f"flight-other-rank{n}-1.json", 9999) for n in range(KEPT + 5)}
    recorder(tmp_path).dump("now")
    assert old < set(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["below a file", "gone meanwhile", "no room"])
def test_a_dump_that_cannot_be_written_is_a_warning_and_leaves_no_part(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "below a file":
        (tmp_path / "file").write_text("")
        plane = recorder(tmp_path / "file" / "folder")
    elif place == "gone meanwhile":
        plane = recorder(tmp_path / "folder")
        monkeypatch.setattr(Path, "rename", lambda self, _target: self.lstat() and (_ for _ in ()).throw(OSError("gone")))
    else:
        plane = recorder(tmp_path / "folder")

        def full(_document: Any, file: Any, **_: Any) -> None:
            file.write("{")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(json, "dump", full)
    with pytest.warns(CommplaneWarning, match="flight records could not be written to"):
        assert plane.try_dump("now") is None
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "file"] == []


def test_a_file_system_that_does_not_answer_is_left_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from commplane.flight import recorder as module

    answer = threading.Event()
    plane = recorder(tmp_path)
    monkeypatch.setattr(module, "_WRITE_S", 0.2)
    monkeypatch.setattr(Folder, "write", lambda *_: answer.wait(60))
    with pytest.warns(CommplaneWarning, match="did not finish in 0.2 s"):
        assert plane.try_dump("now") is None
    answer.set()


def test_a_fault_is_dumped_and_the_file_named_in_the_log_and_in_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plane = recorder(tmp_path)
    tp = group(plane, 1)
    error = PeerError("lost", [0])
    with caplog.at_level(logging.ERROR, "commplane"):
        path = tp.failed(error)
    assert path is not None
    said = parse("f", path.read_text())
    assert said.reason == "'tp' over [0, 1] on cpu failed: PeerError: lost"
    assert (said.groups[0].state, said.groups[0].fault) == ("failed", "PeerError: lost")
    assert [r.message for r in caplog.records] == [f"{said.reason}; flight records in {path}"]
    assert vars(error)["__notes__"] == [f"flight records: {path} (of all ranks: commplane trace {tmp_path} --job job)"]
    assert str(error) == "lost"


def test_an_error_that_was_dumped_is_not_dumped_again(tmp_path: Path) -> None:
    plane = recorder(tmp_path)
    path = group(plane, 1).failed(PeerError("lost"))
    assert path is not None
    path.unlink()
    plane.dump_once(PeerError(f"poisoned; flight records in {path}"), "left")
    assert not path.exists()
    plane.dump_once(ValueError("something else"), "left")
    assert parse("f", path.read_text()).reason == "left"


def test_with_a_length_of_0_a_fault_writes_nothing_and_a_request_does(tmp_path: Path) -> None:
    plane = recorder(tmp_path, length=0)
    assert group(plane, 1).failed(PeerError("lost")) is None
    assert list(tmp_path.iterdir()) == []
    assert parse("f", plane.dump("asked").read_text()).groups[0].records == {}


def test_a_communicator_that_failed_stays_in_later_dumps_after_its_close(tmp_path: Path) -> None:
    plane = recorder(tmp_path)
    failed, healthy = group(plane, 1, 2), group(plane, 7, instance=2)
    failed.failed(PeerError("lost"))
    failed.close()
    healthy.close()
    said = parse("f", plane.dump("later").read_text())
    assert [(g.instance, g.state, g.fault) for g in said.groups] == [(1, "closed", "PeerError: lost")]
    assert [r.seq for r in said.groups[0].records["keeper"]] == [1, 2]


def test_of_communicators_that_failed_and_closed_the_last_are_remembered(tmp_path: Path) -> None:
    plane = recorder(tmp_path)
    for n in range(1, 21):
        one = group(plane, instance=n)
        one.failed(PeerError("lost"))
        one.close()
    instances = [g.instance for g in parse("f", plane.dump("later").read_text()).groups]
    assert instances == list(range(13, 21))


def test_names_of_jobs_can_be_told_apart_and_read() -> None:
    names = {new_job() for _ in range(100)}
    assert len(names) == 100
    assert all(re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", n) for n in names)
