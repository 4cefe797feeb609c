"""The proof that two ranks share memory, and who may remove a name, on the real shared-memory file system."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commplane.agree.shared_memory import ProofSegment, maps
from commplane.api import owned_name, shm, sweep
from commplane.api.shm import SHM_DIRECTORY, Owner, is_abandoned, owner

pytestmark = pytest.mark.skipif(not SHM_DIRECTORY.is_dir(), reason="the system has no shared-memory file system")

DAY_S = 24 * 3600


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Whatever this process names, it removes; and a failed test does not spoil the next."""
    yield
    left = [p for p in SHM_DIRECTORY.glob("commplane-*") if f"-{os.getpid()}-" in p.name]
    for path in left:
        path.unlink()


def made(name: str, age_s: float = 0.0) -> Path:
    """A file in shared memory, as old as said."""
    path = SHM_DIRECTORY / name
    path.write_bytes(b"x")
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_a_rank_maps_its_own_segment_and_that_of_a_peer() -> None:
    one, other = ProofSegment(), ProofSegment()
    assert one.name != other.name and one.digest != other.digest
    assert maps(one.name, one.digest) and maps(other.name, other.digest)


def test_a_digest_that_is_not_of_the_token_in_the_segment_is_refused() -> None:
    one, other = ProofSegment(), ProofSegment()
    assert not maps(one.name, other.digest)
    assert not maps(one.name, hashlib.sha256(b"guess").hexdigest())


def test_a_rank_without_shared_memory_shares_it_with_nobody() -> None:
    assert not maps(None, ProofSegment().digest)


def test_a_segment_that_was_removed_is_not_found() -> None:
    one = ProofSegment()
    name = one.name
    one.unlink()
    one.unlink()
    assert one.name is None and not maps(name, one.digest)


def test_a_file_too_short_to_map_is_refused() -> None:
    one = ProofSegment()
    os.truncate(SHM_DIRECTORY / str(one.name), 0)
    assert not maps(one.name, one.digest)


@pytest.mark.parametrize("name", ["../etc/passwd", "/etc/passwd", "a/b"])
def test_a_peer_cannot_make_us_open_a_file_elsewhere(name: str) -> None:
    assert not maps(name, ProofSegment().digest)


def test_only_this_user_may_open_a_segment() -> None:
    path = SHM_DIRECTORY / str(ProofSegment().name)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_name_says_whose_it_is() -> None:
    name = owned_name("proof")
    assert name.startswith("commplane-proof-") and f"-{os.getpid()}-" in name
    assert owned_name("proof") != name


def test_sweep_removes_names_of_processes_that_have_ended_at_once() -> None:
    code = (
        "import os, signal\n"
        "from commplane.agree.shared_memory import ProofSegment\n"
        "print(ProofSegment().name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    path = SHM_DIRECTORY / killed.stdout.strip()
    assert path.exists(), "a killed process leaves its name: that is what sweep is for"
    sweep()
    assert not path.exists()


def test_sweep_leaves_names_of_living_processes_however_old() -> None:
    path = made(owned_name("proof"), age_s=400 * DAY_S)
    sweep()
    assert path.exists()


def test_sweep_removes_a_name_whose_pid_was_given_to_another_process() -> None:
    kind, namespace, pid, start, token = owned_name("proof").removeprefix("commplane-").rsplit("-", 4)
    path = made(f"commplane-{kind}-{namespace}-{pid}-{int(start) + 1}-{token}")
    sweep()
    assert not path.exists(), "the pid is in use again, but not by the process that made the name"


def test_a_name_of_another_machine_or_boot_says_nothing_about_a_process_here(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = owned_name("proof")
    assert owner(mine) == Owner(os.getpid(), here=True, gone=False)
    with monkeypatch.context() as patch:
        # The inode of the first pid namespace is the same on every machine; the boot id is not.
        patch.setattr(shm, "_read_boot_id", lambda: "11111111-2222-4333-8444-555555555555")
        theirs = owned_name("proof")
        assert owner(theirs) == Owner(os.getpid(), here=True, gone=False)
    kind, namespace, pid, start, token = theirs.removeprefix("commplane-").rsplit("-", 4)
    ended = f"commplane-{kind}-{namespace}-{pid}-{int(start) + 1}-{token}"
    for name in (theirs, ended):
        assert owner(name) == Owner(os.getpid(), here=False, gone=False)


@pytest.mark.parametrize(("age_s", "stays"), [(0.0, True), (0.9 * DAY_S, True), (1.1 * DAY_S, False)])
def test_owners_that_cannot_be_looked_up_keep_their_names_for_a_day(age_s: float, stays: bool) -> None:
    path = made(f"commplane-proof-1-{os.getpid()}-1-aaaa", age_s)
    sweep()
    assert path.exists() == stays


@pytest.mark.parametrize(
    ("name", "age_s", "abandoned"),
    [
        ("{mine}", 400 * DAY_S, False),
        ("commplane-page-1-7-7-aaaa", 0.9 * DAY_S, False),
        ("commplane-page-1-7-7-aaaa", 1.1 * DAY_S, True),
        ("notes", 400 * DAY_S, False),
    ],
)
def test_a_file_anywhere_is_abandoned_by_the_same_rule(tmp_path: Path, name: str, age_s: float, abandoned: bool) -> None:
    path = tmp_path / name.format(mine=owned_name("page"))
    path.touch()
    os.utime(path, (time.time() - age_s,) * 2)
    assert is_abandoned(path) is abandoned


@pytest.mark.parametrize("name", ["commplane-notes-{pid}-x", "commplane-proof-a-{pid}-b-c", "other-proof-1-{pid}-1-aaaa"])
def test_sweep_leaves_what_is_not_named_like_ours(name: str) -> None:
    path = made(name.format(pid=os.getpid()), age_s=400 * DAY_S)
    sweep()
    assert path.exists()
    path.unlink()


def test_sweep_leaves_a_folder_in_its_way_and_goes_on() -> None:
    folder = SHM_DIRECTORY / f"commplane-proof-1-{os.getpid()}-1-folder"
    folder.mkdir()
    os.utime(folder, (0, 0))
    old = made(f"commplane-proof-1-{os.getpid()}-1-later", age_s=2 * DAY_S)
    try:
        sweep()
        assert folder.is_dir() and not old.exists()
    finally:
        folder.rmdir()
