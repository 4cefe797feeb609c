"""The parts of the store slab, each alone."""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading

import pytest

from commplane.errors import CommplaneError
from commplane_cache.stores.slab import snapshot
from commplane_cache.stores.slab.file import DIRECT_ALIGNMENT, SlotFile
from commplane_cache.stores.slab.log import Log
from commplane_cache.stores.slab.record import HEADER_BYTES, RECORD_BYTES, Header, Record, free_record, put_record, records
from commplane_cache.stores.slab.slots import Slots

pytestmark = pytest.mark.timeout(60)


def test_records_come_back_as_they_were():
    written = [Record(5, b"n" * 80, 2**64 - 1), Record(0, b"\0\xff", 0), Record(7, b"", 0), Record(2**40, b"x", 3)]
    packed = [free_record(r.slot) if not r.name else put_record(r.slot, r.name, r.checksum) for r in written]
    assert {len(one) for one in packed} == {RECORD_BYTES}
    assert list(records(b"".join(packed))) == written
    assert list(records(b"".join(packed) + packed[0][:-1])) == written  # a torn tail is nothing


def test_a_record_with_a_wrong_bit_anywhere_is_no_record():
    good = put_record(5, b"name", 77)
    for bit in range(8 * len(good)):
        bent = bytearray(good)
        bent[bit // 8] ^= 1 << bit % 8
        assert list(records(good + bent + good)) == [Record(5, b"name", 77), None, Record(5, b"name", 77)]


def test_a_header_with_a_wrong_bit_anywhere_is_no_header():
    good = Header(4096).pack()
    assert Header.unpack(good) == Header(4096)
    for bit in range(8 * len(good)):
        bent = bytearray(good)
        bent[bit // 8] ^= 1 << bit % 8
        assert Header.unpack(bytes(bent)) is None


class Model:
    """What a log says, kept plainly."""

    def __init__(self):
        self.slots = {}

    def put(self, slot, name, checksum):
        self.slots = {s: entry for s, entry in self.slots.items() if entry[0] != name}
        self.slots[slot] = (name, checksum)

    def free(self, slot):
        self.slots.pop(slot, None)

    def items(self):
        return {(name, slot, checksum) for slot, (name, checksum) in self.slots.items()}


def replayed(path, capacity=50):
    log, found, slots = Log(path, Header(64), sync=False, who="test"), [], Slots(capacity)
    damaged = log.replay(found.append)
    slots.restore(found)
    log.close()
    return set(slots.items()), damaged


def test_a_log_replays_to_what_was_said_last_also_after_it_was_written_anew(tmp_path):
    draw, path, model = random.Random(3), tmp_path / "index", Model()
    log = Log(path, Header(64), sync=False, who="test")
    for step in range(3000):
        slot, name = draw.randrange(50), b"%d" % draw.randrange(30)
        if draw.random() < 0.7:
            log.append([put_record(slot, name, step)])
            model.put(slot, name, step)
        else:
            log.append([free_record(slot)])
            model.free(slot)
        if step == 2000:
            assert log.records == 2001
            log.rewrite(sorted(model.items()))
            assert log.records == len(model.slots)
        if step % 500 == 499:
            log.close()
            assert replayed(path) == (model.items(), 0)
            log = Log(path, Header(64), sync=False, who="test")
            log.replay(lambda _: None)
    log.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]


def test_a_torn_tail_is_forgotten_and_what_is_written_after_it_is_found(tmp_path):
    path = tmp_path / "index"
    log = Log(path, Header(64), sync=False, who="test")
    log.append([put_record(1, b"one", 1)])
    log.close()
    for torn in (1, RECORD_BYTES // 2, RECORD_BYTES - 1):
        with path.open("ab") as file:
            file.write(put_record(2, b"torn", 2)[:torn])
        log = Log(path, Header(64), sync=False, who="test")
        assert log.replay(lambda _: None) == 0
        log.append([put_record(torn, b"after %d" % torn, 3)])
        log.close()
        found, damaged = replayed(path, 10_000)
        assert (b"after %d" % torn, torn, 3) in found
        assert not any(name == b"torn" for name, _, _ in found)
        assert damaged == 0


def test_one_damaged_record_costs_one_record(tmp_path):
    path = tmp_path / "index"
    log = Log(path, Header(64), sync=False, who="test")
    log.append(put_record(n, b"name %d" % n, n) for n in range(20))
    log.close()
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 7 * RECORD_BYTES + 30] ^= 1
    path.write_bytes(data)
    found, damaged = replayed(path)
    assert damaged == 1
    assert found == {(b"name %d" % n, n, n) for n in range(20) if n != 7}


def test_an_append_that_fails_half_way_adds_nothing(tmp_path, monkeypatch):
    path = tmp_path / "index"
    log = Log(path, Header(64), sync=False, who="test")
    log.append([put_record(1, b"one", 1)])
    real, calls = os.pwrite, []

    def full(fd, data, offset):
        calls.append(len(data))
        if len(calls) == 1:
            return real(fd, data[: RECORD_BYTES + 10], offset)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        log.append([put_record(n, b"lost %d" % n, n) for n in (2, 3)])
    monkeypatch.undo()
    assert log.records == 1
    log.append([put_record(4, b"four", 4)])
    log.close()
    assert (b"four", 4, 4) in replayed(path)[0]


def test_what_an_append_that_failed_has_left_is_not_found_behind_a_shorter_one(tmp_path, monkeypatch):
    path = tmp_path / "index"
    log = Log(path, Header(64), sync=False, who="test")
    real = os.pwrite

    def full(fd, data, offset):
        if offset > HEADER_BYTES:
            raise OSError(28, "No space left on device")
        return real(fd, data[: 3 * RECORD_BYTES], offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        log.append([put_record(n, b"lost %d" % n, n) for n in range(5)])
    monkeypatch.undo()
    log.append([put_record(2, b"kept", 7)])  # one record, where three were whole: the last of them was about slot 2, too
    found = []
    log.replay(found.append)
    log.close()
    assert found == [Record(2, b"kept", 7)]
    assert replayed(path) == ({(b"kept", 2, 7)}, 0)


def test_a_log_that_could_not_be_cut_is_cut_before_the_next_append(tmp_path, monkeypatch):
    path = tmp_path / "index"
    log = Log(path, Header(64), sync=False, who="test")
    real = os.pwrite

    def fail(*_):
        raise OSError(5, "Input/output error")

    def half(fd, data, offset):
        if offset > HEADER_BYTES:
            fail()
        return real(fd, data[: 2 * RECORD_BYTES], offset)

    monkeypatch.setattr(os, "pwrite", half)
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(OSError, match="Input/output error"):
        log.append([put_record(n, b"lost %d" % n, n) for n in range(3)])
    monkeypatch.setattr(os, "pwrite", real)
    with pytest.raises(OSError, match="Input/output error"):  # not added, rather than hidden by what comes after it
        log.append([put_record(1, b"kept", 7)])
    monkeypatch.undo()
    log.append([put_record(1, b"kept", 7)])
    log.close()
    assert replayed(path) == ({(b"kept", 1, 7)}, 0)


def test_a_log_written_anew_is_the_one_appended_to_also_when_its_folder_cannot_be_synced(tmp_path, monkeypatch):
    path = tmp_path / "index"
    log = Log(path, Header(64), sync=False, who="test")
    real = os.fsync

    def refuse(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        log.rewrite([(b"one", 1, 1)])
    monkeypatch.undo()
    log.append([put_record(2, b"two", 2)])
    log.close()
    assert replayed(path) == ({(b"one", 1, 1), (b"two", 2, 2)}, 0)


def test_a_log_that_cannot_be_written_anew_goes_on_and_tries_again_later_not_at_each_append(tmp_path, monkeypatch):
    path = tmp_path / "index"
    log = Log(path, Header(64), sync=False, who="test")
    log.append(put_record(1, b"one", n) for n in range(5000))
    assert log.is_mostly_history(1)

    def refuse(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        log.rewrite([(b"one", 1, 4999)])
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]
    log.append([put_record(2, b"two", 2)])
    assert not log.is_mostly_history(2)
    log.append(put_record(1, b"one", n) for n in range(5000))
    assert log.is_mostly_history(2)
    log.rewrite([(b"two", 2, 2), (b"one", 1, 4999)])
    log.close()
    assert replayed(path) == ({(b"one", 1, 4999), (b"two", 2, 2)}, 0)


@pytest.mark.parametrize("content", [b"", b"something else", b"x" * 500, struct.pack("<16s", b"commplane slab 1") + bytes(48)])
def test_a_file_that_is_no_index_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "index"
    path.write_bytes(content)
    with pytest.raises(CommplaneError, match="is not the index of a slab, or its head is damaged; remove the folder"):
        Log(path, Header(64), sync=False, who="test")
    assert path.read_bytes() == content


def test_slots_are_never_lost_nor_given_twice():
    draw, capacity = random.Random(5), 12
    slots = Slots(capacity)
    writing, reading, order = [], [], []  # slots being written; slots being read; names, least recently used first
    for step in range(20_000):
        what = draw.randrange(6)
        if what == 0:
            at = {name: slot for name, slot, _ in slots.items()}
            taken = slots.take(draw.randrange(1, 5))
            new = [slot for slot, _ in taken]
            assert not set(new) & set(writing)
            assert not set(new) & set(reading), "a slot that is being read was given away"
            writing += new
            here = {name for name, _, _ in slots.items()}
            gone = [name for name in order if name not in here]
            read = set(reading)
            free_to_go = [name for name in order if at[name] not in read]
            assert gone == free_to_go[: len(gone)], "not the least recently used went"
            order = [name for name in order if name in here]
        elif what == 1 and writing:
            slot, name = writing.pop(draw.randrange(len(writing))), b"%d" % (step % 40)
            if name in slots:
                assert slots.use(name)
                order.remove(name)
                slots.release(slot)
            else:
                slots.commit(name, slot, step)
            order.append(name)
        elif what == 2 and writing:
            slots.release(writing.pop())
        elif what == 3 and order:
            name = draw.choice(order)
            slot, _ = slots.pin(name)
            reading.append(slot)
            order.remove(name)
            order.append(name)
        elif what == 4 and reading:
            slots.unpin(reading.pop(draw.randrange(len(reading))))
        elif what == 5 and order and draw.random() < 0.3:
            name = order.pop(draw.randrange(len(order)))
            slot = slots.drop(name)
            slots.release(slot)
        held = [slot for _, slot, _ in slots.items()]
        assert [name for name, _, _ in slots.items()] == order
        assert len({*held, *writing}) == len(held) + len(writing) <= capacity
    for slot in reading:
        slots.unpin(slot)
    for slot in writing:
        slots.release(slot)
    assert sorted(slot for slot, _ in slots.take(capacity + 5)) == list(range(capacity))


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_a_copy_in_pieces_has_every_page_once_in_the_order_of_use(monkeypatch, at_once):
    monkeypatch.setattr(snapshot, "_SLOTS_AT_ONCE", at_once)
    draw, slots = random.Random(8), Slots(40)
    assert list(snapshot.in_order(slots, threading.Lock())) == []
    slots.restore([Record(slot, b"old %d" % slot, slot + 2**63) for slot in draw.sample(range(60), 30)])
    assert list(snapshot.in_order(slots, threading.Lock())) == list(slots.items())
    for step in range(300):
        for slot, _ in slots.take(draw.randrange(3)):
            slots.commit(b"%d %d" % (step, slot), slot, step)
        names = [name for name, _, _ in slots.items()]
        slots.use(draw.choice(names))
        if draw.random() < 0.5:
            slots.release(slots.drop(draw.choice(names)))
        assert list(snapshot.in_order(slots, threading.Lock())) == list(slots.items())


def pages(count, nbytes, offset=0):
    room = memoryview(bytearray(count * nbytes + 2 * DIRECT_ALIGNMENT))
    return [room[offset + n * nbytes : offset + (n + 1) * nbytes] for n in range(count)]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 512])
def test_a_slot_file_moves_runs_of_any_length_at_any_address(tmp_path, direct, offset):
    nbytes, count = DIRECT_ALIGNMENT, 1500  # more than one call may take
    file = SlotFile(tmp_path / "pages", nbytes, direct=direct)
    if file.refused is not None:
        file.close()
        pytest.skip(file.refused)
    source = pages(count, nbytes, offset)
    for number, page in enumerate(source):
        page[:] = struct.pack("<I", number) * (nbytes // 4)
    file.write(3, source)
    target = pages(count, nbytes, offset)
    assert file.read(3, target) == count
    assert target == source
    assert file.read(3 + count - 2, target[:5]) == 2  # the file ends there
    file.cut(10)
    assert file.read(3, target) == 7
    file.reserve(20)
    assert file.read(12, target[:8]) == 8
    file.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_write_that_stops_half_way_raises_and_one_that_is_short_goes_on(tmp_path, monkeypatch, direct, offset):
    file = SlotFile(tmp_path / "pages", 2 * DIRECT_ALIGNMENT, direct=direct)
    if file.refused is not None:
        file.close()
        pytest.skip(file.refused)
    room = memoryview(mmap.mmap(-1, 8 * DIRECT_ALIGNMENT))  # aligned, unlike a bytearray
    source = [room[offset + n * 2 * DIRECT_ALIGNMENT :][: 2 * DIRECT_ALIGNMENT] for n in range(3)]
    real, at_once = os.pwritev, 2 if direct and offset else 6
    for number, page in enumerate(source):
        page[:] = bytes([number + 1]) * len(page)
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: real(fd, [views[0][:DIRECT_ALIGNMENT]], at))
    file.write(0, source)  # a call that moved less than it was given is no failure
    monkeypatch.undo()
    target = pages(3, 2 * DIRECT_ALIGNMENT, offset)
    assert file.read(0, target) == 3
    assert target == source
    for moved in (0, *([512] if direct else [])):  # no disk writes nothing for ever, and O_DIRECT cannot go on from there
        monkeypatch.setattr(os, "pwritev", lambda fd, views, at, moved=moved: moved)
        with pytest.raises(
            OSError,
            match=f"wanted {at_once * DIRECT_ALIGNMENT} bytes written to slot 0 and on, found {moved} written",
        ):
            file.write(0, source)
        monkeypatch.undo()
    file.close()


def test_why_o_direct_is_not_used_is_said(tmp_path, monkeypatch):
    file = SlotFile(tmp_path / "a", 5000, direct=True)
    assert file.refused == "pages of 5000 bytes are no multiple of 4096"
    file.close()
    real = os.open

    def refuse(path, flags, mode=0o777):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    file = SlotFile(tmp_path / "b", 4096, direct=True)
    assert file.refused == f"the file system of {tmp_path} does not have O_DIRECT"
    page = pages(1, 4096)
    file.write(0, page)
    assert file.read(0, page) == 1
    file.close()
