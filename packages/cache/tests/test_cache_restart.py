"""Processes that are killed while pages are on their way to storage, and start again."""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace

import pytest
from cache_jobs import WITHOUT, cache, job, passes_of, serving, start

from commplane_cache.demo.job import PassJob
from commplane_cache.demo.launch import Ranks
from commplane_cache.demo.report import differences
from commplane_cache.demo.storage import store_context
from commplane_cache.stores.slab import SlabStore


@pytest.fixture(autouse=True)
def flight_records(monkeypatch, tmp_path_factory):
    """What ranks leave when something goes wrong is not for the user's own folder."""
    monkeypatch.setenv("COMMPLANE_FLIGHT_DIR", str(tmp_path_factory.mktemp("flight")))


def entries(path, word):
    """Key -> checksum, of what a journal says was put or got."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {bytes.fromhex(line[word]): line["crc"] for line in lines if word in line}


def stored(one_job, setup, keys):
    """Key -> checksum, of what a store that is opened anew finds."""
    store, context = SlabStore(), store_context(one_job, setup)
    store.open(context)
    try:
        pages = [memoryview(bytearray(context.page_bytes)) for _ in keys]
        ticket = store.submit_get(list(keys), pages)
        (done,) = store.poll(30.0)
        assert done.ticket == ticket
        return {key: zlib.crc32(page) for key, page, ok in zip(keys, pages, done.ok, strict=True) if ok}
    finally:
        store.close()


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("write", "tp", "cp", "pages"),
    [
        ("write_back", 1, 2, 20),
        pytest.param("write_through", 2, 1, 5, marks=pytest.mark.long),
        pytest.param("write_back", 2, 2, 30, marks=pytest.mark.long),
        pytest.param("write_through_selective", 2, 2, 4, marks=pytest.mark.long),
    ],
)
def test_killed_during_write_back_no_acknowledged_page_is_lost_and_no_damaged_one_is_served(tmp_path, write, tp, cp, pages):
    ranks = range(tp * cp)
    # Slow, so that the kill comes while pages are on their way.
    setup = cache(tmp_path, write=write, fault="slow")
    with Ranks(
        [job([PassJob("first", replace(setup, journal=f"{tmp_path}/first-{r}"))], tp=tp, cp=cp) for r in ranks], tmp_path / "run"
    ) as running:
        for r in ranks:  # what one of them has not stored none of them uses
            serving(tmp_path / f"first-{r}", pages, running)
        running.kill()
    setup = replace(setup, fault="")
    acknowledged = [entries(tmp_path / f"first-{r}", "put") for r in ranks]
    for r in ranks:
        assert stored(replace(job([], tp=tp, cp=cp), rank=r), setup, list(acknowledged[r])) == acknowledged[r]
        shutil.copytree(tmp_path / f"storage-{r}", tmp_path / f"damaged-{r}")
    last = tmp_path / f"damaged-{ranks[-1]}" / "pages"
    spoilt = bytearray(last.read_bytes())
    spoilt[::64] = bytes(byte ^ 1 for byte in spoilt[::64])  # some bytes of each page
    last.write_bytes(spoilt)
    damaged = replace(setup, options={"path": f"{tmp_path}/damaged-{{rank}}"})
    jobs = [
        job(
            [WITHOUT, PassJob("again", replace(setup, journal=f"{tmp_path}/again-{r}")), PassJob("damaged", damaged)],
            tp=tp,
            cp=cp,
        )
        for r in ranks
    ]
    runs = passes_of(start(tmp_path / "run", jobs))
    assert differences(runs) == []
    _, again, spoiled = runs[0]
    assert again.tokens_of("storage") > 0
    assert spoiled.tokens_of("storage") == 0
    for r in ranks:
        served = entries(tmp_path / f"again-{r}", "get")
        known = served.keys() & acknowledged[r].keys()
        assert known and all(served[key] == acknowledged[r][key] for key in known)
