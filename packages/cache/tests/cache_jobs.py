"""Small jobs for the demo's processes, for tests."""

from __future__ import annotations

import time
from pathlib import Path

from commplane_cache.demo.job import CacheJob, Job, PassJob
from commplane_cache.demo.launch import Ended, Ranks
from commplane_cache.demo.report import gather_passes
from commplane_cache.demo.stream import Shape
from commplane_cache.demo.text import SENTENCES

MODEL = {"layers": 2, "hidden": 32, "inner": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "page_tokens": 16, "max_tokens": 1024}
SHAPE = Shape(conversations=4, turns=2, answer=4, open=3, seed=1)
WITHOUT = PassJob("without")


def job(passes, *, tp=2, cp=2, **fields):
    return Job(tp, cp, SHAPE, tuple(passes), SENTENCES, model=MODEL, revision="test", **fields)


def cache(folder: Path, **fields) -> CacheJob:
    return CacheJob(options={"path": f"{folder}/storage-{{rank}}"}, timeout=fields.pop("timeout", 20.0), **fields)


def start(folder: Path, jobs, timeout=90.0, env=None) -> list[Ended]:
    with Ranks(jobs, folder, env=env) as ranks:
        return ranks.wait(timeout)


def passes_of(ended):
    assert all(e.returncode == 0 for e in ended), "\n".join(e.line() + "\n" + e.log[-2000:] for e in ended)
    return gather_passes(ended)


def serving(file: Path, lines: int, ranks: Ranks) -> None:
    """Wait until a journal has that many lines: the stream is being served, and pages are on their way to storage."""
    deadline = time.monotonic() + 60
    while not file.exists() or file.read_bytes().count(b"\n") < lines:
        assert all(p.poll() is None for p in ranks.processes), "a rank ended before it was to be killed"
        assert time.monotonic() < deadline, f"{file} did not grow to {lines} lines"
        time.sleep(0.002)
