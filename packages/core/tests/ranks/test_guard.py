"""The capture guard, and the notes by which a rank tells a dead end from a slow peer."""

from __future__ import annotations

import pytest
from torch.distributed import HashStore

from commplane.agree import Activity, CaptureGuard
from commplane.api import GroupKey
from commplane.errors import CaptureError


def group(purpose: str, ranks: list[int], device: str = "cpu") -> GroupKey:
    return GroupKey(tuple(ranks), device, purpose)


def ranks(count: int) -> list[Activity]:
    store = HashStore()
    return [Activity(store, r) for r in range(count)]


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
    with me.forming(group("tp", [0, 1])), peer.forming(group("tp", [0, 1])):
        assert me.conflict(group("tp", [0, 1]), [1]) is None
        assert peer.conflict(group("tp", [0, 1]), [0]) is None


def test_a_peer_that_forms_another_name_with_us_is_a_conflict_that_shows_both() -> None:
    me, peer = ranks(2)
    with me.forming(group("tp", [0, 1])), peer.forming(group("pp", [0, 1])):
        text = me.conflict(group("tp", [0, 1]), [1])
    assert text == (
        "rank 0 forms communicator 'tp' over [0, 1] on cpu, rank 1 forms 'pp' over [0, 1] on cpu: "
        "every rank must create the same communicators in the same order"
    )


@pytest.mark.parametrize("theirs", [[0, 1], [1, 0, 2], [0, 2, 1]])
def test_a_peer_that_forms_another_list_with_us_is_a_conflict(theirs: list[int]) -> None:
    me, peer, _third = ranks(3)
    with peer.forming(group("tp", theirs)):
        text = me.conflict(group("tp", [0, 1, 2]), [1, 2])
    assert text is not None and str(theirs) in text and "[0, 1, 2]" in text


def test_the_conflict_reads_alike_from_both_sides() -> None:
    me, peer = ranks(2)
    with me.forming(group("tp", [0, 1])), peer.forming(group("pp", [0, 1])):
        mine, theirs = me.conflict(group("tp", [0, 1]), [1]), peer.conflict(group("pp", [0, 1]), [0])
    assert mine is not None and theirs is not None
    assert all("'tp'" in text and "'pp'" in text for text in (mine, theirs))


def test_a_peer_that_is_not_forming_may_still_come() -> None:
    me, peer = ranks(2)
    peer.say("starts up")
    assert me.conflict(group("tp", [0, 1]), [1]) is None


def test_a_peer_without_a_note_may_still_come() -> None:
    assert ranks(2)[0].conflict(group("tp", [0, 1]), [1]) is None


def test_a_peer_that_formed_its_group_and_went_on_may_still_come() -> None:
    me, peer = ranks(2)
    with peer.forming(group("pp", [0, 1])):
        pass
    assert me.conflict(group("tp", [0, 1]), [1]) is None


def test_a_peer_that_forms_a_group_without_us_will_come_when_it_is_done() -> None:
    me, peer, _third = ranks(3)
    with peer.forming(group("pp", [1, 2])):
        assert me.conflict(group("tp", [0, 1]), [1]) is None


def test_only_the_ranks_that_are_waited_for_are_asked() -> None:
    me, peer, _third = ranks(3)
    with peer.forming(group("pp", [0, 1])):
        assert me.conflict(group("tp", [0, 1, 2]), [2]) is None
        assert me.conflict(group("tp", [0, 1, 2]), [2, 1]) is not None


def test_the_note_stays_when_forming_fails_so_that_others_can_read_the_difference() -> None:
    me, peer = ranks(2)
    with pytest.raises(RuntimeError), peer.forming(group("pp", [0, 1])):
        raise RuntimeError
    text = me.conflict(group("tp", [0, 1]), [1])
    assert text is not None and "'pp'" in text


def test_a_peer_that_forms_the_same_group_on_another_device_is_a_conflict() -> None:
    me, peer = ranks(2)
    with peer.forming(group("tp", [0, 1], "cuda")):
        text = me.conflict(group("tp", [0, 1], "cpu"), [1])
    assert text is not None and "on cpu" in text and "on cuda" in text
