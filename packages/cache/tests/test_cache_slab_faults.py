"""The store slab and what happens to files, disks and processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from commplane.api import StoreContext
from commplane.errors import CommplaneError, CommplaneWarning
from commplane_cache.stores.slab import SlabStore, snapshot
from commplane_cache.stores.slab.record import HEADER_BYTES, RECORD_BYTES
from commplane_conformance.pages.book import blank, end, ends, get, keys_of, page_of, put, remove

pytestmark = pytest.mark.timeout(120)
NBYTES = 8192


def opened(path, nbytes=NBYTES, **options):
    store = SlabStore()
    store.open(StoreContext(nbytes, "n", 20.0, {"path": str(path), **options}))
    return store


def in_process(code, *arguments):
    prelude = "import sys; from test_cache_slab_faults import *; "
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(__file__),
    )


def test_a_second_process_is_told_who_has_the_folder_until_that_one_is_killed(tmp_path):
    holder = in_process("store = opened(sys.argv[1]); print('open', flush=True); sys.stdin.read()", tmp_path)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(CommplaneError, match=f"found it in use by process {holder.pid}; close that one"):
            opened(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    store = opened(tmp_path)
    with pytest.raises(CommplaneError, match=f"in use by process {os.getpid()}"):
        opened(tmp_path)
    store.close()
    opened(tmp_path).close()


def test_a_forked_child_does_not_keep_the_folder(tmp_path):
    code = """
store = opened(sys.argv[1])
child = os.fork()
if child == 0:
    print(os.getpid(), flush=True)  # it has come out of the fork
    time.sleep(30)
    os._exit(0)
sys.stdin.read()
"""
    parent = in_process(f"exec({code!r})", tmp_path)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        os.kill(child, 0)  # it is there
        opened(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdin.close()
        parent.stdout.close()


def test_a_file_that_was_cut_gives_errors_not_a_signal(tmp_path):
    keys, store = keys_of("cut", 20), opened(tmp_path)
    assert all(put(store, keys, NBYTES).ok)
    os.truncate(tmp_path / "pages", 10 * NBYTES + 100)
    done = get(store, keys, NBYTES)
    assert sum(done.ok) == 10
    assert "lies behind the end of the file, which was cut; it is forgotten" in done.error
    assert all(put(store, keys, NBYTES).ok)
    assert all(get(store, keys, NBYTES).ok)
    store.close()


@pytest.mark.parametrize("lost", ["pages", "index"])
def test_a_file_that_is_gone_is_a_cache_that_is_empty(tmp_path, lost):
    keys, store = keys_of("gone", 20), opened(tmp_path)
    assert all(put(store, keys, NBYTES).ok)
    store.close()
    (tmp_path / lost).unlink()
    store = opened(tmp_path)
    assert not any(get(store, keys, NBYTES).ok)
    assert all(put(store, keys, NBYTES).ok)
    assert all(get(store, keys, NBYTES).ok)
    store.close()


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (10 * NBYTES, resource.RLIM_INFINITY))
store, keys = opened(sys.argv[1], threads=1), keys_of("full", 16)
first = put(store, keys, NBYTES)
held = get(store, keys, NBYTES)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again = put(store, keys, NBYTES)
read = get(store, keys, NBYTES)
store.close()
print(json.dumps([first.ok, first.error, held.ok, again.ok, read.ok]))
"""


def test_a_full_disk_is_an_error_of_the_pages_that_did_not_fit(tmp_path):
    # A limit on the size of a file stands in for the disk: writing beyond it fails in the same place.
    child = in_process(f"exec({FULL!r})", tmp_path)
    first, error, held, again, read = json.loads(child.communicate(timeout=60)[0])
    assert child.returncode == 0
    assert not all(first)
    assert "slab: writing slots" in error
    assert "File too large" in error
    assert held == first
    assert all(again)
    assert all(read)


def test_a_disk_without_room_for_the_pid_does_not_keep_the_folder_locked(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CommplaneError, match=r"cannot be opened: .*No space left on device"):
        opened(tmp_path)
    assert set(os.listdir("/proc/self/fd")) == before
    monkeypatch.undo()
    opened(tmp_path).close()


def test_a_warning_that_is_an_error_does_not_keep_the_folder_locked(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CommplaneWarning)
        with pytest.raises(CommplaneWarning, match="O_DIRECT is not used"):
            opened(tmp_path, nbytes=5000, direct=True)
    opened(tmp_path, nbytes=5000).close()


def test_other_users_cannot_read_the_pages(tmp_path):
    store = opened(tmp_path / "slab")
    assert all(put(store, keys_of("mine", 3), NBYTES).ok)
    get(store, keys_of("mine", 3), NBYTES)
    store.close()  # writes the index anew
    opened(tmp_path / "direct", direct=True, capacity_pages=8).close()
    for folder in (tmp_path / "slab", tmp_path / "direct"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()} == dict.fromkeys(
            ("index", "lock", "pages"), 0o600
        )


@pytest.mark.parametrize("moved", [0, 512])
def test_a_page_of_which_the_disk_took_a_part_is_not_acknowledged(tmp_path, monkeypatch, moved):
    store = opened(tmp_path, direct=True, capacity_pages=8)
    if store._file.refused is not None:
        store.close()
        pytest.skip(store._file.refused)
    monkeypatch.setattr(os, "pwritev", lambda *_: moved)
    done = put(store, keys_of("part", 1), NBYTES)
    monkeypatch.undo()
    assert done.ok == (False,)
    assert f"wanted {NBYTES} bytes written to slot 0 and on, found {moved} written" in done.error
    assert all(put(store, keys_of("part", 1), NBYTES).ok)
    assert all(get(store, keys_of("part", 1), NBYTES).ok)
    store.close()


def test_room_that_cannot_be_reserved_is_said_at_open(tmp_path):
    with pytest.raises(CommplaneError, match=f"slab: {tmp_path} cannot be opened: .*"):
        opened(tmp_path, reserve=True, capacity_bytes=1 << 60)
    store = opened(tmp_path, reserve=True, capacity_pages=8)
    assert (tmp_path / "pages").stat().st_blocks * 512 >= 8 * NBYTES
    store.close()


def test_a_reservation_that_fails_half_way_gives_back_what_it_took(tmp_path, monkeypatch):
    keys, store = keys_of("kept", 5), opened(tmp_path)
    assert all(put(store, keys, NBYTES).ok)
    store.close()
    real = os.posix_fallocate

    def full(fd, offset, length):
        real(fd, offset, length // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CommplaneError, match=r"cannot be opened: .*No space left on device"):
        opened(tmp_path, reserve=True, capacity_pages=1000)
    assert (tmp_path / "pages").stat().st_size == 5 * NBYTES
    store = opened(tmp_path)
    assert all(get(store, keys, NBYTES).ok)
    store.close()


def test_an_index_that_a_killed_process_was_writing_anew_is_removed(tmp_path):
    keys, store = keys_of("kept", 5), opened(tmp_path)
    assert all(put(store, keys, NBYTES).ok)
    store.close()
    (tmp_path / "index.new").write_bytes((tmp_path / "index").read_bytes()[: HEADER_BYTES + RECORD_BYTES])
    store = opened(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["index", "lock", "pages"]
    assert all(get(store, keys, NBYTES).ok)
    store.close()


def test_whatever_happens_to_the_index_no_wrong_page_is_served(tmp_path):
    draw, keys = random.Random(11), keys_of("index", 40)
    store = opened(tmp_path, capacity_pages=30)
    for key in keys:
        assert put(store, [key], NBYTES).ok == (True,)
    assert all(remove(store, keys[15:20]).ok)
    store.close()
    whole = (tmp_path / "index").read_bytes()
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 6)):
            kind = draw.randrange(4)
            at = draw.randrange(HEADER_BYTES, len(data))
            if kind == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[at:]
                data += bytes(draw.randrange(300))
            elif kind == 2:  # a piece of the log is lost
                del data[at : at + draw.randrange(2 * RECORD_BYTES)]
            else:  # an older part of the log comes again
                start = HEADER_BYTES + RECORD_BYTES * draw.randrange(20)
                data[at:at] = whole[start : start + RECORD_BYTES * draw.randrange(4)]
            if len(data) <= HEADER_BYTES:
                break
        (tmp_path / "index").write_bytes(data)
        store = opened(tmp_path, capacity_pages=30)
        get(store, keys, NBYTES)  # compares the bytes of what it says is there
        assert all(put(store, keys[-10:], NBYTES).ok)
        assert all(get(store, keys[-10:], NBYTES).ok)
        store.close()


def test_a_record_whose_page_never_reached_the_disk_is_a_miss(tmp_path):
    keys, store = keys_of("power", 8), opened(tmp_path)
    assert all(put(store, keys, NBYTES).ok)
    store.close()
    with (tmp_path / "pages").open("r+b") as file:  # what a power failure leaves of a write that was not synced
        file.seek(3 * NBYTES)
        file.write(bytes(NBYTES))
        file.seek(6 * NBYTES + 4096)
        file.write(bytes(4096))
    store = opened(tmp_path)
    assert get(store, keys, NBYTES).ok == (True, True, True, False, True, True, False, True)
    assert store.usage().pages == 6
    store.close()


def test_sync_puts_the_page_on_the_device_before_its_record(tmp_path, monkeypatch):
    store = opened(tmp_path, sync=True, threads=1)
    names = {os.stat(tmp_path / name).st_ino: name for name in ("pages", "index")}
    calls = []

    def spy(name):
        real = getattr(os, name)

        def call(fd, *arguments):
            calls.append((name, names[os.fstat(fd).st_ino]))
            return real(fd, *arguments)

        monkeypatch.setattr(os, name, call)

    for name in ("pwritev", "pwrite", "fdatasync"):
        spy(name)
    assert all(put(store, keys_of("sync", 3), NBYTES).ok)
    assert calls == [("pwritev", "pages"), ("fdatasync", "pages"), ("pwrite", "index"), ("fdatasync", "index")]
    store.close()


def test_a_device_that_fails_fails_every_put_that_it_may_have_lost(tmp_path, monkeypatch):
    store = opened(tmp_path, sync=True, threads=2)
    index, both, told = os.stat(tmp_path / "index").st_ino, threading.Barrier(2, timeout=30), set()
    real = os.fdatasync

    def fdatasync(fd):
        if os.fstat(fd).st_ino == index:
            return real(fd)
        both.wait()  # both have written; the kernel drops what both wrote, and tells each open file once
        if fd not in told:
            told.add(fd)
            raise OSError(5, "Input/output error")
        return real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    tickets = [store.submit_put([key], [page_of(key, NBYTES)]) for key in keys_of("lost", 2)]
    done = ends(store, tickets)
    monkeypatch.undo()
    assert [one.ok for one in done.values()] == [(False,), (False,)]
    assert all("Input/output error" in one.error for one in done.values())
    assert all(put(store, keys_of("lost", 2), NBYTES).ok)
    store.close()


def test_a_page_that_makes_room_is_taken_back_in_the_log_before_its_slot_is_written(tmp_path, monkeypatch):
    store = opened(tmp_path, capacity_pages=2, threads=1)
    old, new = keys_of("victim", 2), keys_of("successor", 1)
    assert all(put(store, old, NBYTES).ok)
    real = os.pwritev
    seen = []

    def stop(fd, *arguments):
        seen.append((tmp_path / "index").read_bytes())
        return real(fd, *arguments)

    monkeypatch.setattr(os, "pwritev", stop)
    assert all(put(store, new, NBYTES).ok)
    monkeypatch.undo()
    store.close()
    (tmp_path / "index").write_bytes(seen[0])  # as a process would find it that comes after a kill at that moment
    store = opened(tmp_path, capacity_pages=2)
    assert store.usage().pages == 1
    assert get(store, [*old, *new], NBYTES).ok == (False, True, False)
    store.close()


WRITER = """
store, number = opened(sys.argv[1], capacity_pages=24, threads=2), 0
while True:
    key = [b"%s %d" % (sys.argv[2].encode(), n) for n in range(number, number + 4)]
    assert all(put(store, key, NBYTES).ok)
    number += 4
    print(number, flush=True)
"""


def test_a_store_killed_while_pages_make_room_serves_no_wrong_page_and_keeps_the_newest(tmp_path):
    draw = random.Random(2)
    for number in range(4):
        child = in_process(f"exec({WRITER!r})", tmp_path, number)
        until, reached = draw.randrange(40, 200), 0
        try:
            while reached < until:
                reached = int(child.stdout.readline())
            time.sleep(draw.random() * 0.005)
        finally:
            child.kill()
            rest, _ = child.communicate()
        reached = max([reached, *map(int, rest.split())])
        store = opened(tmp_path, capacity_pages=24)
        keys = [b"%d %d" % (number, n) for n in range(reached + 8)]
        done = get(store, keys, NBYTES)
        # Up to 4 more may have begun to make room when it was killed, and the last 4 of those that it wrote may not be in order.
        assert all(done.ok[reached - 16 : reached]), done
        store.close()


def test_the_order_of_use_outlives_an_orderly_close(tmp_path):
    keys, store = keys_of("order", 10), opened(tmp_path, capacity_pages=10)
    for key in keys:
        put(store, [key], NBYTES)
    get(store, keys[:3], NBYTES)
    store.close()
    store = opened(tmp_path, capacity_pages=10)
    put(store, keys_of("newer", 4), NBYTES)
    assert get(store, keys, NBYTES).ok == (True,) * 3 + (False,) * 4 + (True,) * 3
    store.close()


def test_the_log_stays_small_however_often_pages_come_and_go(tmp_path):
    store = opened(tmp_path, nbytes=16, capacity_pages=64, threads=1)
    largest = 0
    for number in range(400):
        assert all(put(store, keys_of(f"round {number}", 48), 16).ok)
        largest = max(largest, (tmp_path / "index").stat().st_size)
    assert largest < 3 * (4096 + 2 * 64) * RECORD_BYTES // 2
    store.close()
    store = opened(tmp_path, nbytes=16, capacity_pages=64)
    assert all(get(store, keys_of("round 399", 48), 16).ok)
    store.close()


def test_pages_are_asked_for_used_and_forgotten_while_the_log_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_SLOTS_AT_ONCE", 16)
    keys, store = keys_of("copied", 100), opened(tmp_path, nbytes=16, capacity_pages=100, threads=1)
    assert all(put(store, keys, 16).ok)
    for _ in range(60):  # history
        assert all(remove(store, keys[80:]).ok)
        assert all(put(store, keys[80:], 16).ok)
    told, lock, length = [], store._lock, store._log.records
    monkeypatch.setattr(store._log, "is_mostly_history", lambda alive: True)

    class Between:
        """The lock of the slots; what the scheduler and another worker do while it is free between two pieces."""

        def __enter__(self):
            lock.acquire()

        def __exit__(self, *_):
            lock.release()
            if len(told) < 5:
                store._lock = lock
                store.submit_exists(keys[-3:])  # answered at once, in memory
                told.extend(done.ok for done in store.poll())
                with lock:
                    slot, _ = store._slots.pin(store._namespace + keys[len(told)])
                    store._slots.unpin(slot)
                    store._slots.drop(store._namespace + keys[-len(told)])
                store._lock = self

    store._lock = Between()
    store._shorten_log()
    store._lock = lock
    assert store._log.records <= 100 < length
    assert told == [(True,) * 3, (True, True, False), (True, False, False), (False,) * 3, (False,) * 3]
    (tmp_path / "copy").mkdir()
    for name in ("index", "pages"):  # as after a kill at this moment
        (tmp_path / "copy" / name).write_bytes((tmp_path / name).read_bytes())
    store.close()
    store = opened(tmp_path / "copy", nbytes=16, capacity_pages=100)
    assert all(get(store, keys[:95], 16).ok)  # what was dropped may be there or not, and is whole if it is
    get(store, keys[95:], 16)
    store.close()


def test_less_room_than_before_keeps_what_fits(tmp_path):
    keys, store = keys_of("less", 20), opened(tmp_path, capacity_pages=20)
    put(store, keys, NBYTES)
    store.close()
    store = opened(tmp_path, capacity_pages=5)
    assert sum(get(store, keys, NBYTES).ok) == 5
    assert store.usage().pages == store.usage().capacity == 5
    assert (tmp_path / "pages").stat().st_size == 5 * NBYTES
    store.close()
    store = opened(tmp_path, capacity_pages=30)
    assert sum(get(store, keys, NBYTES).ok) == 5
    assert all(put(store, keys, NBYTES).ok)
    store.close()


def test_pages_of_another_size_are_refused_with_both_numbers(tmp_path):
    opened(tmp_path).close()
    with pytest.raises(CommplaneError, match=r"wanted pages of 4096 bytes, found pages of 8192 in .*; give another folder"):
        opened(tmp_path, nbytes=4096)
    opened(tmp_path).close()  # and the lock was let go


def test_o_direct_that_is_refused_is_said_and_done_without(tmp_path):
    with pytest.warns(CommplaneWarning, match="O_DIRECT is not used: pages of 5000 bytes are no multiple of 4096"):
        store = opened(tmp_path, nbytes=5000, direct=True)
    assert all(put(store, keys_of("refused", 3), 5000).ok)
    assert all(get(store, keys_of("refused", 3), 5000).ok)
    store.close()


def test_many_threads_that_put_get_and_remove_in_little_room_never_see_a_wrong_page(tmp_path):
    draw, keys = random.Random(4), keys_of("crowd", 60)
    store = opened(tmp_path, nbytes=512, capacity_pages=40, threads=4)
    out, served = {}, 0
    for _ in range(1500):
        some = draw.sample(keys, draw.randrange(1, 9))
        kind = draw.randrange(5)
        if kind < 2:
            out[store.submit_put(some, [page_of(key, 512) for key in some])] = None
        elif kind < 4:
            pages = blank(len(some), 512)
            out[store.submit_get(some, pages)] = (some, pages)
        else:
            out[store.submit_remove(some)] = None
        while len(out) > 24 or (len(out) > 16 and draw.random() < 0.5):
            for done in store.poll(5.0):
                asked = out.pop(done.ticket)
                if asked is not None:
                    right = [page == page_of(key, 512) for key, page in zip(*asked, strict=True)]
                    assert all(good for good, ok in zip(right, done.ok, strict=True) if ok)
                    assert done.error is None
                    served += sum(done.ok)
    assert served > 100
    while out:
        for done in store.poll(5.0):
            out.pop(done.ticket)
    assert all(end(store, store.submit_remove(keys)).ok)
    assert store.usage().pages == 0
    assert all(put(store, keys[:40], 512).ok), "slots were lost"
    assert all(get(store, keys[:40], 512).ok)
    store.close()
