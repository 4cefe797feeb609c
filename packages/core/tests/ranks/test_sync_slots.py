"""The slots of a sync round inside one host: what is believed, what ends a wait, and who may do what afterwards. One process."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from commplane.api import SyncField, SyncSpec, Vote
from commplane.errors import CommplaneWarning, PeerError
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.runtime.sync import segment
from commplane.runtime.sync.slots import Slots, segment_bytes
from commplane.testing import run_threads, shm_leftovers

pytestmark = pytest.mark.timeout(60)

COLUMNS = 5
SPEC = SyncSpec(name="c", api=(1, 0), fields=(SyncField("max", Vote.MAX),))


def nobody(_ranks: Sequence[int]) -> Sequence[int]:
    return ()


def group(
    world_size: int, timeout: float = 0.3, dead: Callable[[Sequence[int]], Sequence[int]] = nobody
) -> tuple[mmap.mmap, list[Slots]]:
    """Slots of global ranks 10, 11, ... in anonymous memory, and that memory."""
    memory = mmap.mmap(-1, segment_bytes(COLUMNS, world_size))
    ranks = [10 + r for r in range(world_size)]
    communicator: Any = None  # nothing is sent through it
    return memory, [Slots(COLUMNS, r, ranks, memory, timeout, dead, communicator) for r in range(world_size)]


def send(slots: Slots, *row: int) -> None:
    slots.buffer.cast("q")[:] = memoryview(b"".join(n.to_bytes(8, "little", signed=True) for n in row)).cast("q")
    slots.send()


def test_rows_are_those_of_the_last_exchange_whichever_rank_is_first() -> None:
    _, slots = group(3)
    for k in range(50):
        for r in sorted(range(3), key=lambda r: (r * 7 + k) % 3):
            send(slots[r], *(100 * k + 10 * r + c - 50 for c in range(COLUMNS)))
        wanted = [[100 * k + 10 * r + c - 50 for c in range(COLUMNS)] for r in range(3)]
        assert [one.collect().tolist() for one in slots] == [wanted] * 3


def test_a_rank_may_send_the_next_row_before_others_have_read_this_one() -> None:
    _, (first, second) = group(2)
    send(first, *[1] * COLUMNS)
    send(second, *[2] * COLUMNS)
    assert first.collect().tolist() == [[1] * COLUMNS, [2] * COLUMNS]
    send(first, *[3] * COLUMNS)
    assert second.collect().tolist() == [[1] * COLUMNS, [2] * COLUMNS]


def test_a_torn_row_is_never_taken_whichever_byte_of_it_is_old() -> None:
    memory, (reader, writer) = group(2, timeout=0.02)
    for k in range(2):  # both slots have held a whole row
        for one in (reader, writer):
            send(one, *[k] * COLUMNS)
        for one in (reader, writer):
            one.collect()
    before = memory[:]
    send(writer, *[-7] * COLUMNS)
    send(reader, *[0] * COLUMNS)
    whole = memory[:]
    changed = [i for i in range(len(whole) // 2, len(whole)) if whole[i] != before[i]]
    assert len(changed) >= COLUMNS * 8 + 4
    for i in changed:
        memory[i : i + 1] = before[i : i + 1]
        # Not `collect`: half a hundred deadlines would take long.
        assert reader._take([1]) == [1], f"byte {i}"
        memory[i : i + 1] = whole[i : i + 1]
    memory[changed[0] : changed[0] + 1] = before[changed[0] : changed[0] + 1]
    with pytest.raises(PeerError, match=r"waited 0\.02 s for rank 11") as raised:
        reader.collect()
    assert raised.value.missing_ranks == (11,)
    memory[changed[0] : changed[0] + 1] = whole[changed[0] : changed[0] + 1]
    assert reader.collect().tolist() == [[0] * COLUMNS, [-7] * COLUMNS]


def test_ranks_that_ended_or_left_end_the_wait_unless_their_row_is_there() -> None:
    ended: set[int] = set()
    _, (a, b, c) = group(3, timeout=30, dead=lambda ranks: [r for r in ranks if r in ended])
    for one in (a, b, c):
        send(one, *[1] * COLUMNS)
    ended.add(12)
    b.leave()
    assert a.collect().tolist() == [[1] * COLUMNS] * 3
    send(a, *[2] * COLUMNS)
    with pytest.raises(PeerError, match="the process of rank 12 has ended") as raised:
        a.collect()
    assert raised.value.missing_ranks == (12,)
    ended.clear()
    with pytest.raises(PeerError, match="rank 11 left the round") as raised:
        a.collect()
    assert raised.value.missing_ranks == (11,)


def test_a_wait_that_was_interrupted_may_be_taken_up_again() -> None:
    def interrupt(_ranks: Sequence[int]) -> Sequence[int]:
        raise KeyboardInterrupt

    _, (a, b) = group(2, timeout=30, dead=interrupt)
    send(a, *[1] * COLUMNS)
    with pytest.raises(KeyboardInterrupt):
        a.collect()
    send(b, *[2] * COLUMNS)
    assert a.collect().tolist() == [[1] * COLUMNS, [2] * COLUMNS]


def test_closing_gives_the_memory_back_and_so_does_forgetting_without_a_word() -> None:
    for end, said in ((Slots.close, "left the round"), (Slots.forget, "waited 0.3 s for rank 11")):
        memory, (a, b) = group(2)
        send(a, *[1] * COLUMNS)
        if end is Slots.close:
            b.leave()
        with pytest.raises(PeerError, match=said):
            a.collect()
        a._words.release()
        a._bytes.release()
        end(b)
        end(b)
        assert memory.closed


def threads(world_size: int, function: Callable[[Plane], Any]) -> list[Any]:
    settings = {"timeout": 20, "startup_timeout": 20}
    out = run_threads(world_size, function, plugins=lambda _rank: PluginHost(), config=lambda _rank: settings)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def issue_one(plane: Plane, **arguments: Any) -> bool:
    """Whether a round of this plane has a thread."""
    name = f"thread{plane.rank}"
    with plane.sync_round("x", specs=[SPEC], **arguments) as votes:
        votes.name = name
        votes.issue({"c.max": plane.rank})
        found = any(t.name == f"commplane sync {name}" for t in threading.enumerate())
        assert votes.result() == {"c.max": plane.world_size - 1}
    return found


def test_a_round_inside_a_host_has_no_thread_and_one_over_backends_that_were_named_has() -> None:
    assert threads(2, issue_one) == [False, False]
    assert threads(2, lambda plane: issue_one(plane, backends=["torch"])) == [True, True]
    assert not shm_leftovers()


@pytest.mark.parametrize("step", ["_create", "_map"])
def test_where_one_rank_has_no_slots_all_go_by_their_threads(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, once = getattr(segment, step), threading.Lock()

    def fails(name: str, nbytes: int) -> Any:
        if once.acquire(blocking=False):
            raise OSError(28, "No space left on device", name)
        return real(name, nbytes)

    monkeypatch.setattr(segment, step, fails)
    with pytest.warns(CommplaneWarning, match="goes without slots in shared memory.*No space left on device"):
        assert threads(3, issue_one) == [True] * 3
    assert not shm_leftovers()


def test_a_rank_that_closes_is_named_to_those_that_wait_long_before_the_deadline() -> None:
    def rank_main(plane: Plane) -> float:
        votes = plane.sync_round("x", specs=[SPEC], timeout=15)
        votes.step({"c.max": 1})
        if plane.rank == 1:
            votes._close(wait=False)
            return 0.0
        votes.issue({"c.max": 1})
        began = time.monotonic()
        with pytest.raises(PeerError, match=r"rank 1 did not take part: .*left") as raised:
            votes.result()
        assert raised.value.missing_ranks == (1,)
        took = time.monotonic() - began
        votes._close(wait=False)
        return took

    assert max(threads(2, rank_main)) < 10
