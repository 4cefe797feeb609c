"""What was found of P2P is remembered: for whom, how long, and whatever happens to the file."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from gpu_machine import UUIDS

from commplane_custom_ar.gpu import cache
from commplane_custom_ar.gpu.proof import Proof

ABOUT = cache.key(UUIDS[:2], ["580.95.05"] * 2, [False] * 2, [{"boot": "b", "pid": "p"}] * 2)
HOLDS = Proof((), True, 15.0)
FAILS = Proof(("P2P between GPU a and b hangs",), True, 15.0)


def test_what_was_found_is_recalled_with_when_and_how_to_forget_it(tmp_path: Path) -> None:
    for proof in (HOLDS, FAILS):
        cache.remember(ABOUT, proof, tmp_path / "new" / "folder")
        found = cache.recall(ABOUT, 15.0, tmp_path / "new" / "folder")
        assert found is not None
        assert (found.failures, found.waited) == (proof.failures, proof.waited)
        path = re.search(r"found on \d{4}-\d\d-\d\d .*; remove (\S+) to try again", found.recalled)
        assert path is not None
        assert Path(path.group(1)).is_file()


@pytest.mark.parametrize(
    "other",
    [
        cache.key(UUIDS[:2], ["590.1"] * 2, [False] * 2, [{"boot": "b", "pid": "p"}] * 2),
        cache.key(UUIDS[1:3], ["580.95.05"] * 2, [False] * 2, [{"boot": "b", "pid": "p"}] * 2),
        cache.key(UUIDS[:2], ["580.95.05"] * 2, [True] * 2, [{"boot": "b", "pid": "p"}] * 2),
        cache.key(UUIDS[:2], ["580.95.05"] * 2, [False] * 2, [{"boot": "c", "pid": "p"}] * 2),
        cache.key(UUIDS[:2], ["580.95.05"] * 2, [False] * 2, [{"boot": "b", "pid": "p"}, {"boot": "b", "pid": "q"}]),
    ],
)
def test_another_driver_gpu_mps_start_or_container_is_tried_anew(tmp_path: Path, other: dict[str, Any]) -> None:
    cache.remember(ABOUT, HOLDS, tmp_path)
    assert cache.recall(other, 15.0, tmp_path) is None
    assert cache.recall(ABOUT, 15.0, tmp_path) is not None


def test_the_order_of_ranks_makes_no_difference() -> None:
    places = [{"boot": "b", "pid": "p"}, {"boot": "b", "pid": "q"}]
    one = cache.key(UUIDS[:2], ["1", "1"], [False, False], places)
    assert one == cache.key(UUIDS[1::-1], ["1", "1"], [False, False], places[::-1])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"key": {}}',
        '{"key": {}, "proof": PROOF, "when": 1}',
        '{"key": KEY}',
        '{"key": KEY, "proof": {}, "when": 1}',
        '{"key": KEY, "proof": 3, "when": 1}',
    ],
)
def test_a_broken_file_is_ignored_with_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    cache.remember(ABOUT, HOLDS, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(text.replace("KEY", json.dumps(ABOUT)).replace("PROOF", json.dumps(HOLDS.to_json())))
    assert cache.recall(ABOUT, 15.0, tmp_path) is None
    assert str(path) in caplog.text
    assert "is ignored, and the GPUs are tried again" in caplog.text
    cache.remember(ABOUT, HOLDS, tmp_path)
    assert cache.recall(ABOUT, 15.0, tmp_path) is not None


def test_what_says_nothing_of_the_gpus_is_not_remembered_and_a_short_wait_is_not_held_against_them(tmp_path: Path) -> None:
    cache.remember(ABOUT, Proof(("no memory",), False, 15.0), tmp_path)
    assert not list(tmp_path.iterdir())
    cache.remember(ABOUT, FAILS, tmp_path)
    assert cache.recall(ABOUT, 29.0, tmp_path) is not None
    assert cache.recall(ABOUT, 31.0, tmp_path) is None
    cache.remember(ABOUT, HOLDS, tmp_path)
    assert cache.recall(ABOUT, 31.0, tmp_path) is not None


def test_who_reads_while_another_writes_sees_a_whole_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.remember(ABOUT, HOLDS, tmp_path)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            cache.remember(ABOUT, FAILS, tmp_path)
            cache.remember(ABOUT, HOLDS, tmp_path)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        found = [cache.recall(ABOUT, 15.0, tmp_path) for _ in range(500)]
    finally:
        stop.set()
        for writer in writers:
            writer.join(60.0)
    assert None not in found
    assert not caplog.records
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["p2p"]  # nothing half-written is left


def test_a_folder_that_cannot_be_written_is_a_notice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache.remember(ABOUT, HOLDS, tmp_path / "file" / "folder")
    assert "cannot be remembered" in caplog.text
    assert cache.recall(ABOUT, 15.0, tmp_path / "file" / "folder") is None


def test_old_files_go(tmp_path: Path) -> None:
    cache.remember({**ABOUT, "gpus": []}, HOLDS, tmp_path)
    (old,) = tmp_path.iterdir()
    os.utime(old, (0, 0))
    (tmp_path / "other.json").touch()
    os.utime(tmp_path / "other.json", (0, 0))
    cache.remember(ABOUT, HOLDS, tmp_path)
    assert not old.exists()
    assert (tmp_path / "other.json").exists()
    assert cache.recall(ABOUT, 15.0, tmp_path) is not None


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, Path("/c/commplane")),
        ({"XDG_CACHE_HOME": "c", "HOME": "/h"}, Path("/h/.cache/commplane")),
        ({"HOME": "/h"}, Path("/h/.cache/commplane")),
        ({"XDG_CACHE_HOME": ""}, None),
        ({}, None),
    ],
)
def test_the_folder_is_that_of_the_user(environ: dict[str, str], wanted: Path | None) -> None:
    assert cache.folder(environ) == wanted
    assert cache.recall(ABOUT, 15.0, None) is None


def test_the_place_is_this_start_of_the_machine_and_these_namespaces() -> None:
    found = cache.place()
    assert found == cache.place()
    assert set(found) == {"boot", "pid", "ipc", "mnt"}
    assert found["boot"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
