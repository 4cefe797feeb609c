"""The command ``commplane-cache demo``, from end to end."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cache_jobs import WITHOUT, cache, job
from torch.distributed import TCPStore

from commplane_cache.cli import main
from commplane_cache.demo.job import PassJob
from commplane_cache.demo.launch import Ended
from commplane_cache.demo.report import Pass, Request, differences, gather_passes, summary, table
from commplane_cache.demo.scratch import scratch
from commplane_cache.demo.serve import serve
from commplane_cache.tiers import FlatCopier


@pytest.fixture(autouse=True)
def flight_records(monkeypatch, tmp_path_factory):
    """What ranks leave when something goes wrong is not for the user's own folder."""
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path_factory.mktemp("flight")))


def test_one_rank_computes_less_with_the_cache_and_finds_its_pages_after_a_restart(tmp_path, capfd):
    assert main(["demo", "--ranks", "1x1", "--conversations", "2", "--turns", "2", "--out", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert "answers are the same in all passes and on all ranks: 32 tokens" in said
    without, cached, again = json.loads((tmp_path / "cache.json").read_text())["passes"]
    computed = [sum(r["computed"] for r in p["requests"]) for p in (without, cached, again)]
    assert computed[0] == sum(r["prompt"] for r in without["requests"]) > computed[1] > computed[2]
    assert all(r["storage"] > 0 for r in again["requests"])
    assert re.search(rf"after a restart: {computed[2]} prompt tokens computed instead of {computed[0]}", said)
    # Nothing but the results stays, the storage of the demo neither.
    drawn = ["cache.png"] if importlib.util.find_spec("matplotlib") else []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache.json", *drawn]


def processes_of(folder):
    """Ranks that run on jobs of `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().split(b"\0") if process.name.isdigit() else []
        except OSError:  # it ended meanwhile
            continue
        if b"commplane_cache.demo.rank" in words and any(str(folder).encode() in word for word in words):
            found.append(int(process.name))
    return found


def until(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_demo_that_is_killed_leaves_no_process_and_the_next_one_clears_its_folder(tmp_path):
    code = f"from commplane_cache.cli import main; main(['demo', '--ranks', '2x1', '--out', {str(tmp_path)!r}])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        until(lambda: len(processes_of(tmp_path)) == 2)
        demo.kill()
    until(lambda: not processes_of(tmp_path))
    (left,) = tmp_path.iterdir()
    with scratch(tmp_path) as mine:
        assert mine.is_dir() and not left.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ranks", ["2x1", "1x2", "2x2"])
@pytest.mark.parametrize("write", ["write_back", "write_through_selective"])
def test_every_grid_and_write_policy_gives_the_same_answers(tmp_path, capfd, ranks, write):
    options = ["--ranks", ranks, "--write", write, "--conversations", "4", "--policy", "timeout", "--out", str(tmp_path)]
    assert main(["demo", *options]) == 0, capfd.readouterr()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--fault", "broken@0"], "wanted KIND@RANK"),
        (["--fault", "slow@4"], "RANK below 4"),
        (["--store-option", "path"], "wanted NAME=VALUE"),
        (["--conversations", "0"], "conversations must be 1 or more, found 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_any_rank_starts(tmp_path, capfd, options, text):
    assert main(["demo", "--out", str(tmp_path), *options]) == 1
    error = capfd.readouterr().err
    assert text in error and error.count("\n") == 1


@pytest.mark.timeout(60)
def test_a_store_that_nobody_provides_ends_the_demo_with_its_name_and_those_there_are(tmp_path, capfd):
    assert main(["demo", "--ranks", "1x1", "--store", "slap", "--out", str(tmp_path)]) == 1
    error = capfd.readouterr().err
    assert "no installed wheel provides page store 'slap': did you mean 'slab'?" in error


@pytest.mark.parametrize("right", [True, False])
def test_pages_that_come_back_in_another_order_change_the_answers_and_are_seen(tmp_path, monkeypatch, right):
    copied = FlatCopier.to_device
    if not right:
        monkeypatch.setattr(FlatCopier, "to_device", lambda self, host, device: copied(self, host[::-1], device))
    meeting = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    setup = cache(tmp_path)
    said = serve(job([WITHOUT, PassJob("first", setup), PassJob("again", setup)], tp=1, cp=1, world_size=1, port=meeting.port))
    wrong = differences(gather_passes([Ended(0, 0, {"passes": said}, "")]))
    assert (wrong == []) is right


def served(name, cached, answer=(1, 2), computed=64, device=0, digest=0):
    request = Request(0, 0, 64, answer, computed, device, 0, 0, 0.5, 1.0)
    return Pass(name, cached, (request,), 1.0, 3, {}, digest)


def test_another_answer_tier_or_decision_is_a_difference():
    plain, cached = served("without", False), served("with", True, computed=32, device=32, digest=7)
    assert differences([[plain, cached], [plain, cached]]) == []
    assert "was answered (1, 3)" in differences([[plain, replace(cached, requests=served("", True, (1, 3)).requests)]])[0]
    (text,) = differences([[plain, cached], [plain, served("with", True, digest=7)]])
    assert text == "pass 'with', rank 1: pages came from other tiers than on rank 0"
    (text,) = differences([[plain, cached], [plain, replace(cached, digest=8)]])
    assert text == "pass 'with', rank 1: the cache took other decisions than on rank 0"
    assert "0 requests were answered instead of 1" in differences([[plain, replace(cached, requests=())]])[0]


def test_table_and_summary_show_the_figures():
    passes = [served("without", False), served("with", True, computed=32, device=32)]
    rows = table(passes, 16).splitlines()
    assert rows[2].split()[:4] == ["without", "64", "64", "100%"]
    assert rows[3].split()[:5] == ["with", "64", "32", "50%", "2"]
    assert summary(passes, 16) == [
        "with: 32 prompt tokens computed instead of 64, 2.0 times less; 2 pages found; first token after 1.00 of the time"
    ]
