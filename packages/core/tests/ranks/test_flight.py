"""Flight records of real ranks: one is killed, one hangs, one raises; what `commplane trace` says then."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch

import commplane
from commplane import errors
from commplane.cli import main
from commplane.flight import Report, read_job, report
from commplane.runtime import Plane
from commplane.testing import Outcome, PluginHost, run_processes, run_threads

TIMEOUT_S = 4.0


def start(store: Any, rank: int, world_size: int, folder: str, **config: Any) -> Plane:
    settings = {"timeout": TIMEOUT_S, "flight_dir": folder, **config}
    return commplane.init(store=store, rank=rank, world_size=world_size, plugins=PluginHost(), config=settings)


def results(outcomes: list[Outcome]) -> list[Any]:
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
    return [o.result for o in outcomes]


def merged(folder: Path) -> Report:
    dumps, skipped = read_job(folder)
    assert skipped == []
    return report(dumps)


def killed(store: Any, rank: int, world_size: int, folder: str) -> dict[str, Any]:
    plane = start(store, rank, world_size, folder)
    tp = plane.communicator("tp")
    x = torch.ones(1000)
    for _ in range(3):
        tp.all_reduce_(x)
    tp.broadcast(x, 0)
    tp.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    said: dict[str, Any] = {}
    try:
        tp.all_reduce_(x, "max")
    except errors.PeerError as error:
        said["text"], said["notes"] = str(error), getattr(error, "__notes__", [])
    try:
        tp.all_reduce_(x, "max")
    except errors.PeerError as error:
        said["later"] = str(error)
    plane.close()
    return said


def test_survivors_of_a_killed_rank_leave_dumps_that_name_it_and_the_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = run_processes(3, killed, str(tmp_path))
    assert outcomes[1].returncode == -signal.SIGKILL
    survivors = [outcomes[0], outcomes[2]]
    files = {int(p.name.rpartition("-rank")[2].partition("-")[0]): p for p in tmp_path.iterdir()}
    assert sorted(files) == [0, 2]
    for o in survivors:
        said = results([o])[0]
        assert o.output.count(f"; flight records in {files[o.rank]}") >= 1  # the log, with nothing set up for it
        assert str(files[o.rank]) not in said["text"]
        assert said["later"].endswith(f"; flight records in {files[o.rank]}")
        assert [n.count(str(files[o.rank])) for n in said["notes"]] == [1]
    assert main(["trace", str(tmp_path), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert [(f["kind"], f["ranks"], f["seq"]) for f in found["findings"]] == [("missing", [1], 6)]
    text = found["findings"][0]["text"]
    assert "rank 1 did not come to #6 all_reduce(max, float32, 4000 bytes); ranks 0, 2 failed in it" in text
    assert "its process had ended when ranks 0, 2 dumped" in text
    (lane,) = found["lanes"]
    assert (lane["backend"], lane["finished_by_all"], lane["call"]) == ("torch", 5, "#5 barrier()")
    trace = json.loads(Path(found["trace"]).read_text())
    calls = [(e["pid"], e["name"], e["args"]["seq"]) for e in trace["traceEvents"] if e["ph"] == "X"]
    names = [*["all_reduce"] * 3, "broadcast", "barrier", "all_reduce (failed)"]
    assert calls == [(r, name, n) for r in (0, 2) for n, name in enumerate(names, start=1)]


def hangs(store: Any, rank: int, world_size: int, folder: str) -> dict[str, Any]:
    plane = start(store, rank, world_size, folder, run_timeout=30, startup_timeout=60)
    tp = plane.communicator("tp")
    tp.all_reduce_(torch.ones(4))
    if rank == 1:
        store.wait(["rank 0 has looked"])
        os.kill(os.getpid(), signal.SIGUSR1)  # it is in Python: dumped as well
        while not list(Path(folder).glob("*rank1*")):
            time.sleep(0.01)
        tp.all_reduce_(torch.ones(4))
        plane.close()
        return {}

    def look() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        while not list(Path(folder).glob("*rank0*")):
            time.sleep(0.01)
        store.set("rank 0 has looked", "1")  # only now does rank 1 go on, and the wait of the main thread end

    threading.Timer(1.5, look).start()  # a call that has run for less than a second is not held to be stuck
    tp.all_reduce_(torch.ones(4))
    plane.close()
    return {"handler": str(signal.getsignal(signal.SIGUSR1))}


def test_a_signal_dumps_a_process_that_waits_in_gloo_and_the_call_goes_on(tmp_path: Path) -> None:
    said = results(run_processes(2, hangs, str(tmp_path)))
    assert said[0] == {"handler": str(signal.SIG_DFL)}
    found = merged(tmp_path)
    assert [d.reason for d in found.dumps] == ["SIGUSR1", "SIGUSR1"]
    (lane,) = found.lanes
    waiting, missing = lane.places[0], lane.places[1]
    assert waiting.pending is not None and waiting.pending.state == "running" and waiting.pending.seq == 2
    assert (waiting.finished, missing.finished, missing.pending) == (1, 1, None)
    assert [(f.kind, f.ranks, f.seq) for f in found.findings] == [("missing", (1,), 2)]
    assert "rank 0 has been in it for" in found.findings[0].text


def cannot_write(store: Any, rank: int, world_size: int, folder: str, how: str) -> dict[str, Any]:
    if how == "a warning is an error":
        warnings.simplefilter("error", errors.CommplaneWarning)
    plane = start(store, rank, world_size, f"{folder}/{rank}" if how == "no room" else f"{folder}/file/flight")
    tp = plane.communicator("tp")
    if how == "no room":  # from here on, no file of this process may grow beyond this
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    try:
        tp.poison(errors.PeerError("lost", [1 - rank]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        tp.all_reduce(torch.ones(1))
    except errors.PeerError as error:
        later = str(error)
    plane.close()
    return {"later": later}


@pytest.mark.parametrize("how", ["no folder", "no room", "a warning is an error"])
def test_a_dump_that_cannot_be_written_is_said_and_changes_nothing_else(how: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcomes = run_processes(2, cannot_write, str(tmp_path), how)
    for o, said in zip(outcomes, results(outcomes), strict=True):
        assert said["later"] == f"[tp rank {o.rank}/2] is poisoned by an earlier fault and must be closed: lost"
        # In "no room" the log of the rank is a file as well.
        assert how == "no room" or "flight records could not be written to" in o.output
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "file"] == []


def left_alone(store: Any, rank: int, world_size: int, folder: str) -> str:
    try:
        with start(store, rank, world_size, folder) as plane:
            tp = plane.communicator("tp")
            tp.all_reduce(torch.ones(2))
            if rank == 1:
                store.wait(["inside"])
                time.sleep(0.2)  # a dump from before the other's call would say nothing about that call
                raise ValueError("out of luck")
            store.set("inside", "1")
            tp.all_reduce(torch.ones(2))
    except (ValueError, errors.PeerError) as error:
        return type(error).__name__
    return "nothing"


def test_a_rank_that_leaves_its_plane_through_an_exception_says_so_in_a_dump(tmp_path: Path) -> None:
    assert results(run_processes(2, left_alone, str(tmp_path))) == ["PeerError", "ValueError"]
    found = merged(tmp_path)
    assert found.dumps[1].reason == "the plane is left after ValueError: out of luck"
    assert found.dumps[0].reason.startswith("'tp' over [0, 1] on cpu failed: PeerError") and found.dumps[0].earlier == ()
    (finding,) = found.findings
    assert (finding.kind, finding.ranks, finding.seq) == ("missing", (1,), 2)
    assert "which says: the plane is left after ValueError: out of luck" in finding.text


def forked(store: Any, rank: int, world_size: int, folder: str) -> list[Any]:
    plane = start(store, rank, world_size, folder)
    plane.communicator("tp")
    child = os.fork()
    if child == 0:
        try:
            plane.dump_flight_records("a child's")
        except errors.CommplaneError:
            os.kill(os.getpid(), signal.SIGUSR1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    empty = not list(Path(folder).iterdir())
    plane.close()
    return [os.WTERMSIG(status), empty]


def test_a_forked_child_neither_dumps_nor_has_the_handler(tmp_path: Path) -> None:
    assert results(run_processes(1, forked, str(tmp_path))) == [[signal.SIGUSR1, True]]


def good(said: list[Any]) -> list[Any]:
    for r in said:
        if isinstance(r, Exception):
            raise r
    return said


def with_folder(folder: Path, **more: Any) -> Any:
    return lambda _rank: {"timeout": 5, "flight_dir": str(folder), **more}


def test_all_ranks_of_a_plane_have_one_job_and_two_planes_have_two(tmp_path: Path) -> None:
    def rank_main(plane: Plane) -> list[str]:
        plane.communicator("tp").all_reduce(torch.ones(1))
        return [plane.dump_flight_records("asked").name for _ in range(2)]

    for _ in range(2):
        names = good(run_threads(2, rank_main, config=with_folder(tmp_path), plugins=lambda _rank: PluginHost()))
        assert names[0][0] == names[0][1]
    jobs = {p.name.partition("-rank")[0] for p in tmp_path.iterdir()}
    assert len(jobs) == 2 and len(list(tmp_path.iterdir())) == 4


def test_every_collective_is_recorded_with_numbers_that_are_equal_on_all_ranks(tmp_path: Path) -> None:
    def rank_main(plane: Plane) -> None:
        tp, other = plane.communicator("tp"), plane.communicator("other")
        x = torch.ones(4)
        tp.all_reduce(x)
        with pytest.raises(errors.UnsupportedOperation):
            tp.all_reduce(x.to_sparse())
        if plane.rank == 0:  # alone on this rank, and sent to nobody
            with pytest.raises(errors.UnsupportedOperation):
                tp.all_reduce_(torch.ones(1).expand(4))
        other.barrier()
        tp.all_reduce_(x, "max")
        tp.all_gather(x.to(torch.int32))
        tp.reduce_scatter(x)
        tp.broadcast(x, 1)
        tp.barrier()
        plane.dump_flight_records("asked")

    good(run_threads(2, rank_main, config=with_folder(tmp_path), plugins=lambda _rank: PluginHost()))
    found = merged(tmp_path)
    assert found.findings == []
    by_name = {lane.key.purpose: lane for lane in found.lanes}
    wanted = [
        (1, "all_reduce", "sum", "float32", 16),
        (2, "all_reduce", "max", "float32", 16),
        (3, "all_gather", None, "int32", 16),
        (4, "reduce_scatter", "sum", "float32", 16),
        (5, "broadcast", None, "float32", 16),
        (6, "barrier", None, None, 0),
    ]
    for place in by_name["tp"].places.values():
        assert [(r.seq, r.collective, r.op, r.dtype, r.nbytes) for r in place.records] == wanted
        assert all(r.state == "done" for r in place.records)
    assert [r.collective for r in by_name["other"].places[0].records] == ["barrier"]


def test_records_of_a_third_backend_are_kept_by_core_and_survive_prepare(tmp_path: Path) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        assert tp.plan.backends == ("faulty", "torch")
        tp.all_reduce(torch.ones(2))
        tp.prepare("all_reduce", dtype=torch.float32, max_bytes=64)  # backends are bound anew
        tp.all_reduce(torch.ones(2))
        tp.barrier()
        plane.dump_flight_records("asked")

    good(run_threads(2, rank_main, config=with_folder(tmp_path), plugins=lambda _rank: faulty.host()))
    found = merged(tmp_path)
    assert {lane.backend: [r.seq for r in lane.places[0].records] for lane in found.lanes} == {"faulty": [1, 2], "torch": [1]}
    assert found.dumps[0].versions["backend faulty"] == "faulty-wheel 1.0"


def test_a_fault_of_one_communicator_dumps_those_of_the_whole_plane_once(tmp_path: Path) -> None:
    def rank_main(plane: Plane) -> None:
        good_one, bad_one = plane.communicator("good"), plane.communicator("bad")
        good_one.all_reduce(torch.ones(1))
        bad_one.poison(errors.PeerError("lost", [1]))
        bad_one.poison(errors.PeerError("lost again", [1]))
        with pytest.raises(errors.PeerError, match="; flight records in "):
            bad_one.all_reduce(torch.ones(1))

    good(run_threads(2, rank_main, config=with_folder(tmp_path), plugins=lambda _rank: PluginHost()))
    found = merged(tmp_path)
    assert [d.earlier for d in found.dumps] == [(), ()]
    assert [(g.key.purpose, g.state, g.fault) for g in found.dumps[0].groups] == [
        ("good", "open", ""),
        ("bad", "failed", "PeerError: lost"),
    ]
    assert len(found.dumps[0].groups[0].records["torch"]) == 1


def test_with_the_recorder_off_nothing_is_wrapped_and_no_fault_is_dumped(tmp_path: Path) -> None:
    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        tp.all_reduce(torch.ones(1))
        torch_backend = tp.backends[0]
        assert tp._flight.bindable()["torch"] is torch_backend
        tp.poison(errors.PeerError("lost", [1]))
        with pytest.raises(errors.PeerError) as caught:
            tp.all_reduce(torch.ones(1))
        return str(caught.value)

    said = good(run_threads(2, rank_main, config=with_folder(tmp_path, flight_records=0), plugins=lambda _rank: PluginHost()))
    assert said[0].endswith("must be closed: lost")
    assert list(tmp_path.iterdir()) == []


def test_a_dump_of_a_closed_plane_or_into_nowhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    planes: list[Plane] = []

    def rank_main(plane: Plane) -> None:
        planes.append(plane)
        with pytest.raises(errors.CommplaneError, match=r"could not be written.*COMMPLANE_FLIGHT_DIR names the folder"):
            plane.dump_flight_records("asked")

    good(run_threads(1, rank_main, config=with_folder(tmp_path / "file"), plugins=lambda _rank: PluginHost()))
    with pytest.raises(errors.CommplaneError, match="closed"):
        planes[0].dump_flight_records("asked")


def test_a_communicator_left_through_an_exception_is_dumped_once_with_its_calls(tmp_path: Path) -> None:
    def rank_main(plane: Plane) -> None:
        with plane.communicator("tp") as tp:
            tp.all_reduce(torch.ones(1))
            raise ValueError("out of luck")

    said = run_threads(2, rank_main, config=with_folder(tmp_path), plugins=lambda _rank: PluginHost())
    assert [str(e) for e in said] == ["out of luck"] * 2
    found = merged(tmp_path)
    assert [(d.reason, d.earlier) for d in found.dumps] == [("'tp' over [0, 1] on cpu failed: ValueError: out of luck", ())] * 2
    assert [r.seq for r in found.dumps[0].groups[0].records["torch"]] == [1]
