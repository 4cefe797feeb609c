"""The proof that two ranks share memory, on the real shared-memory file system."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commplane.agree.shared_memory import SHM_DIRECTORY, SHM_PREFIX, ProofSegment, sweep

pytestmark = pytest.mark.skipif(not SHM_DIRECTORY.is_dir(), reason="the system has no shared-memory file system")

HOUR_S = 3600


@pytest.fixture
def nonce() -> Iterator[str]:
    """A name nobody else uses; whatever a failed test leaves under it is removed."""
    value = secrets.token_hex(8)
    yield value
    for path in names(value):
        path.unlink()


def names(nonce: str) -> list[Path]:
    return sorted(SHM_DIRECTORY.glob(f"*{nonce}*"))


def test_a_rank_maps_its_own_segment(nonce: str) -> None:
    proof = ProofSegment(nonce, 0)
    assert proof.maps(0, proof.digest)


def test_a_rank_maps_the_segment_of_a_peer(nonce: str) -> None:
    one, other = ProofSegment(nonce, 0), ProofSegment(nonce, 1)
    assert one.digest != other.digest
    assert one.maps(1, other.digest) and other.maps(0, one.digest)


def test_a_digest_that_is_not_of_the_token_in_the_segment_is_refused(nonce: str) -> None:
    one, other = ProofSegment(nonce, 0), ProofSegment(nonce, 1)
    assert not one.maps(1, one.digest)
    assert not one.maps(1, hashlib.sha256(b"guess").hexdigest())
    assert one.maps(1, other.digest)


def test_a_rank_without_shared_memory_has_no_digest_to_map(nonce: str) -> None:
    proof = ProofSegment(nonce, 0)
    assert not proof.maps(0, None)


def test_a_segment_of_another_exchange_is_not_found(nonce: str) -> None:
    proof = ProofSegment(nonce, 0)
    elsewhere = ProofSegment(f"{nonce}x", 1)
    assert not elsewhere.maps(0, proof.digest)


def test_a_file_too_short_to_map_is_refused(nonce: str) -> None:
    one, other = ProofSegment(nonce, 0), ProofSegment(nonce, 1)
    (path,) = [p for p in names(nonce) if p.name.endswith("-1")]
    os.truncate(path, 0)
    assert not one.maps(1, other.digest)


def test_a_name_that_is_taken_is_left_alone_and_shared_with_nobody(nonce: str) -> None:
    first = ProofSegment(nonce, 0)
    second = ProofSegment(nonce, 0)
    assert second.digest is None
    assert first.maps(0, first.digest)


def test_only_this_user_may_open_a_segment(nonce: str) -> None:
    ProofSegment(nonce, 0)
    (path,) = names(nonce)
    assert path.stat().st_mode & 0o777 == 0o600


def test_unlink_leaves_the_file_system_as_it_was(nonce: str) -> None:
    assert names(nonce) == []
    proof = ProofSegment(nonce, 0)
    assert [p.name for p in names(nonce)] == [f"{SHM_PREFIX}proof-{nonce}-0"]
    proof.unlink([0])
    assert names(nonce) == []


def test_unlink_removes_the_names_it_is_given_and_no_others(nonce: str) -> None:
    segments = [ProofSegment(nonce, r) for r in range(4)]
    segments[0].unlink([1, 3])
    assert [p.name[-1] for p in names(nonce)] == ["0", "2"]


def test_a_survivor_can_remove_the_names_of_all_also_when_some_are_gone(nonce: str) -> None:
    segments = [ProofSegment(nonce, r) for r in range(3)]
    segments[1].unlink([1])
    segments[0].unlink(range(3))
    segments[0].unlink(range(3))
    assert names(nonce) == []


def test_a_segment_that_was_unlinked_is_not_mapped_by_anyone_who_comes_later(nonce: str) -> None:
    one, other = ProofSegment(nonce, 0), ProofSegment(nonce, 1)
    other.unlink([1])
    assert not one.maps(1, other.digest)


def left_behind(nonce: str, prefix: str, age_s: float) -> Path:
    path = SHM_DIRECTORY / f"{prefix}{nonce}-{age_s:g}"
    path.write_bytes(b"x")
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_sweep_removes_old_names_of_ours(nonce: str) -> None:
    old = left_behind(nonce, SHM_PREFIX, 25 * HOUR_S)
    sweep()
    assert not old.exists()


def test_sweep_never_removes_a_young_name(nonce: str) -> None:
    proof = ProofSegment(nonce, 0)
    minutes = left_behind(nonce, SHM_PREFIX, 600)
    sweep()
    assert minutes.exists()
    assert proof.maps(0, proof.digest)


def test_sweep_never_removes_a_name_of_somebody_else(nonce: str) -> None:
    theirs = left_behind(nonce, "notcommplane-", 25 * HOUR_S)
    sweep()
    assert theirs.exists()


def test_sweep_passes_by_what_it_cannot_remove(nonce: str) -> None:
    folder = SHM_DIRECTORY / f"{SHM_PREFIX}{nonce}"
    folder.mkdir()
    try:
        os.utime(folder, (0, 0))
        old = left_behind(nonce, SHM_PREFIX, 25 * HOUR_S)
        sweep()
        assert folder.is_dir() and not old.exists()
    finally:
        folder.rmdir()
