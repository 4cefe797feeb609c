"""What a process that ended left, in whatever way it ended."""

from __future__ import annotations

import random
import subprocess
import time

import pytest

from commplane_conformance.marks import clause, needs
from commplane_conformance.pages.book import exists, get, keys_of, page_of, put
from commplane_conformance.pages.place import FOLDER, Place

pytestmark = pytest.mark.timeout(180)


@clause("P10")
@needs("durable")
def test_a_store_opened_again_finds_its_pages(place: Place) -> None:
    nbytes, keys = place.page_bytes, keys_of("again", 50)
    for start in (0, 25):
        store = place.open()
        assert exists(store, keys).ok == (True,) * start + (False,) * (50 - start)
        assert all(put(store, keys[start : start + 25], nbytes).ok)
        store.close()
    store = place.open()
    done = get(store, keys, nbytes)
    assert all(done.ok)
    assert done.error is None


@clause("P11")
@needs("durable")
def test_after_kill_9_every_acknowledged_page_is_found_and_no_torn_one(place: Place) -> None:
    rounds, draw, nbytes, count = (25 if place.subject.full else 4), random.Random(8), 96 << 10, 120
    for number in range(rounds):
        seed = f"round {number}"
        child = place.writer(seed, count, draw.choice((1, 3, 8)), nbytes)
        acknowledged = 0
        try:
            acknowledged = _read_until(child, draw.randrange(count // 2))
            time.sleep(draw.random() * 0.01)  # not at the moment of an answer
        finally:
            child.kill()
            rest, _ = child.communicate()
        acknowledged = max([acknowledged, *(int(word) for word in rest.split())])
        store = place.open(page_bytes=nbytes)
        keys = keys_of(seed, count)
        done = get(store, keys, nbytes)  # compares the bytes of what is said to be there
        lost = [index for index, ok in enumerate(done.ok[:acknowledged]) if not ok]
        assert not lost, f"{len(lost)} of {acknowledged} acknowledged pages are lost in round {number}: {done.error}"
        assert all(put(store, keys, nbytes).ok), "what a killed process left cannot be completed"
        assert all(get(store, keys, nbytes).ok)
        store.close()


def _read_until(child: subprocess.Popen[str], pages: int) -> int:
    assert child.stdout is not None
    acknowledged = -1
    while acknowledged < pages:
        line = child.stdout.readline().strip()
        assert line.isdigit(), f"the writer ended before it was killed, after {acknowledged} pages: {line}"
        acknowledged = int(line)
    return acknowledged


@clause("P12")
@needs("durable")
def test_damaged_bytes_are_not_served_and_may_be_put_again(place: Place) -> None:
    if not place.is_in_folder:
        pytest.skip(f"the store is not in a folder of the test's: give an option that holds {FOLDER}")
    nbytes, keys = place.page_bytes, keys_of("damaged", 6)
    store = place.open()
    assert all(put(store, keys, nbytes).ok)
    store.close()
    harmed = {1, 4}
    found = [index for index in harmed if _flip(place, bytes(page_of(keys[index], nbytes)[:48]))]
    if len(found) < len(harmed):
        pytest.skip("the bytes of a page are in no file of the store as they are")
    store = place.open()
    done = get(store, keys, nbytes)
    assert done.ok == tuple(index not in harmed for index in range(6))
    assert done.error
    assert all(put(store, keys, nbytes).ok)
    done = get(store, keys, nbytes)
    assert all(done.ok), "a damaged page stands in the way of the right one"
    assert done.error is None


def _flip(place: Place, piece: bytes) -> bool:
    """Change one bit of the file in which these bytes are."""
    for path in place.files():
        at = path.read_bytes().find(piece)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([piece[0] ^ 1]))
            return True
    return False


@clause("P13")
@needs("shared")
def test_processes_see_each_others_pages(place: Place) -> None:
    nbytes, keys = place.page_bytes, keys_of("shared", 12)
    store = place.open()
    child = place.writer("shared", 12, 12, nbytes)
    try:
        assert child.stdout is not None
        said = [child.stdout.readline().strip() for _ in range(2)]
        assert said == ["0", "12"]
        assert all(get(store, keys, nbytes).ok)
    finally:
        child.communicate(timeout=place.timeout)  # it closes its store
