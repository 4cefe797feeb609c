"""Real processes as ranks, TP 2 x CP 2, over a real store: what one rank does changes no answer, or is an error that names it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from cache_jobs import SHAPE, WITHOUT, cache, job, passes_of, serving, start
from torch.distributed import TCPStore

from commplane.errors import CommplaneError, PeerError
from commplane.testing import shm_leftovers
from commplane_cache.demo.job import PassJob
from commplane_cache.demo.launch import Ranks
from commplane_cache.demo.report import differences
from commplane_cache.demo.serve import serve


@pytest.fixture(autouse=True)
def flight_records(monkeypatch, tmp_path_factory):
    """What ranks leave when something goes wrong is not for the user's own folder."""
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path_factory.mktemp("flight")))


@pytest.mark.timeout(150)
def test_answers_and_agreement_stay_whatever_the_storage_of_one_rank_does(tmp_path):
    before, plain = shm_leftovers(), cache(tmp_path)
    passes = [
        WITHOUT,
        PassJob("blocking", plain),
        PassJob("pipelined", replace(plain, pipelined=True)),
        PassJob("slow", replace(plain, policy="timeout", patience=0.02)),
        PassJob("failing", replace(plain, pipelined=True)),
        PassJob("gone", replace(plain, policy="best_effort")),
    ]
    faults = {"slow": 1, "failing": 2, "gone": 3}
    jobs = [job(p.on_rank(fault=p.name) if faults.get(p.name) == rank else p for p in passes) for rank in range(4)]
    runs = passes_of(start(tmp_path / "run", jobs))
    assert differences(runs) == []
    without, blocking, pipelined, _, failing, _ = runs[0]
    assert without.computed == without.prompt
    assert blocking.tokens_of("storage") == 0 and blocking.computed < without.computed / 2
    assert pipelined.tokens_of("storage") > 0 and pipelined.computed < blocking.computed / 2
    # What rank 2 lost nobody used: more was computed than where storage is well, and less than without storage.
    assert pipelined.computed < failing.computed < without.computed
    assert failing.counters["storage"]["failed"] > 0
    assert shm_leftovers() <= before


@pytest.mark.long
@pytest.mark.timeout(120)
@pytest.mark.parametrize("pipelined", [False, True], ids=["blocking", "pipelined"])
def test_a_rank_that_leaves_out_rounds_is_named_on_all_others(tmp_path, pipelined):
    one = PassJob("with the cache", cache(tmp_path, pipelined=pipelined, timeout=4.0))
    jobs = [job([one.on_rank(mute=1) if rank == 2 else one]) for rank in range(4)]
    ended = start(tmp_path / "run", jobs, env={"COMMPLANE_RUN_TIMEOUT": "8"})
    assert all(e.returncode == 1 for e in ended), [e.line() for e in ended]
    for e in ended:
        if e.rank != 2:
            assert (e.said["error"], e.said["missing"]) == ("PeerError", [2]), e.line()
            assert "sync_cache" in e.said["message"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "pipelined", [pytest.param(False, id="blocking"), pytest.param(True, marks=pytest.mark.long, id="pipelined")]
)
def test_when_a_rank_is_killed_the_others_end_and_name_it(tmp_path, pipelined):
    before = shm_leftovers()
    one = PassJob("with the cache", cache(tmp_path, pipelined=pipelined, timeout=5.0, journal=f"{tmp_path}/journal"))
    long = replace(job([one]), shape=replace(SHAPE, conversations=50))
    jobs = [long] + [replace(long, passes=(one.on_rank(journal=""),))] * 3
    with Ranks(jobs, tmp_path / "run", env={"COMMPLANE_RUN_TIMEOUT": "5"}) as ranks:
        serving(tmp_path / "journal", 3, ranks)
        os.kill(ranks.processes[3].pid, signal.SIGKILL)
        ended = ranks.wait(60)
    assert ended[3].returncode == -signal.SIGKILL
    for e in ended[:3]:
        assert e.returncode == 1, e.line() + e.log[-2000:]
        assert e.said["error"] == "PeerError" and e.said["missing"] == [3], e.line()
    assert shm_leftovers() <= before


@pytest.mark.timeout(60)
def test_a_store_that_one_rank_cannot_open_ends_all_ranks_and_names_it(tmp_path):
    (tmp_path / "storage-1").write_text("not a folder")
    one = PassJob("with the cache", cache(tmp_path, timeout=10.0))
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(rank):
        try:
            return serve(job([one], tp=1, cp=2, rank=rank, world_size=2, port=meeting.port))
        except CommplaneError as error:
            return error

    with ThreadPoolExecutor(2) as threads:  # two ranks in one process: nobody is killed here
        waiting, failing = threads.map(run, range(2))
    assert isinstance(failing, CommplaneError) and "storage-1" in str(failing)
    assert isinstance(waiting, PeerError) and waiting.missing_ranks == (1,)
