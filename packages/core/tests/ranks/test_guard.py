"""The capture guard, and the notes by which a rank tells a dead end from a slow peer."""

from __future__ import annotations

import json

import pytest
from torch.distributed import HashStore

from commplane.agree import Activity, BoundedStore, CaptureGuard, Forming
from commplane.api import GroupKey
from commplane.errors import CaptureError


def group(purpose: str, ranks: list[int], device: str = "cpu") -> GroupKey:
    return GroupKey(tuple(ranks), device, purpose)


def ranks(count: int) -> list[Activity]:
    store = BoundedStore(HashStore(), 10)
    return [Activity(store, r, "notes") for r in range(count)]


def attempt(key: GroupKey, instance: int = 1) -> Forming:
    return Forming(key, instance, f"decision of {key} {instance}")


def never(_key: str) -> int:
    """This rank has not begun to form anything."""
    return 0


def test_the_guard_refuses_only_while_a_capture_is_open() -> None:
    guard = CaptureGuard()
    guard.check("prepare")
    guard.active = True
    with pytest.raises(CaptureError, match="prepare inside a capture"):
        guard.check("prepare")
    guard.active = False
    guard.check("prepare")


def test_a_rank_that_left_no_note_has_none() -> None:
    assert ranks(2)[0].read(1) is None


def test_a_note_is_read_by_the_other_ranks() -> None:
    me, peer = ranks(2)
    peer.say("starts up")
    note = me.read(1)
    assert note is not None
    assert (note["text"], note["forming"]) == ("starts up", None)


def test_a_later_note_replaces_an_earlier_one() -> None:
    me, peer = ranks(2)
    peer.say("starts up")
    peer.say("is up")
    note = me.read(1)
    assert note is not None and note["text"] == "is up"


def test_peers_that_form_the_same_group_are_no_conflict() -> None:
    me, peer = ranks(2)
    tp = group("tp", [0, 1])
    with me.forming(attempt(tp)), peer.forming(attempt(tp)):
        assert me.conflict(tp, [1], lambda _key: 1) is None
        assert peer.conflict(tp, [0], lambda _key: 1) is None


@pytest.mark.parametrize(
    "theirs", [group("pp", [0, 1, 2]), group("tp", [1, 0, 2]), group("tp", [0, 1]), group("tp", [0, 1, 2], "cuda")], ids=str
)
def test_a_peer_that_waits_for_us_in_a_group_that_we_have_not_begun_is_a_conflict_that_shows_both(theirs: GroupKey) -> None:
    me, peer, _third = ranks(3)
    mine = group("tp", [0, 1, 2])
    with peer.forming(attempt(theirs)):
        text = me.conflict(mine, [1, 2], never)
    assert text == (
        f"rank 0 forms communicator {mine}, rank 1 forms {theirs}: "
        "every rank must create the same communicators in the same order"
    )


def test_the_peer_is_told_where_its_own_first_round_is_decided() -> None:
    store = BoundedStore(HashStore(), 10)
    me, peer = Activity(store, 0, "notes"), Activity(store, 1, "notes")
    theirs = attempt(group("pp", [0, 1]))
    with peer.forming(theirs):
        text = me.conflict(group("tp", [0, 1]), [1], never)
    assert json.loads(store.get(theirs.decision)) == {"conflict": text}


def test_a_group_that_we_have_begun_too_is_no_conflict_even_if_the_peer_has_not_come_out_of_it() -> None:
    """The peer is descheduled between the last round and the note that says so."""
    me, peer = ranks(2)
    theirs = group("a", [0, 1])
    with peer.forming(attempt(theirs, instance=2)):
        assert me.conflict(group("b", [0, 1]), [1], {str(theirs): 2}.__getitem__) is None
        assert me.conflict(group("b", [0, 1]), [1], {str(theirs): 1}.__getitem__) is not None


def test_a_peer_whose_attempt_failed_may_still_come() -> None:
    me, peer = ranks(2)
    with pytest.raises(RuntimeError), peer.forming(attempt(group("pp", [0, 1]))):
        raise RuntimeError("no")
    assert me.conflict(group("tp", [0, 1]), [1], never) is None
    note = me.read(1)
    assert note is not None and note["text"].startswith("failed to form communicator 'pp'")


def test_peers_without_a_note_or_in_groups_without_us_may_still_come() -> None:
    me, peer, third = ranks(3)
    peer.say("is up")
    with third.forming(attempt(group("pp", [1, 2]))):
        assert me.conflict(group("tp", [0, 1, 2]), [1, 2], never) is None


def test_only_the_ranks_that_are_waited_for_are_asked() -> None:
    me, peer, _third = ranks(3)
    with peer.forming(attempt(group("pp", [0, 1]))):
        assert me.conflict(group("tp", [0, 1, 2]), [2], never) is None
