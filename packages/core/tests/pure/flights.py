"""Dumps for tests, made as a rank makes them but with the times that a test wants. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commplane.flight.read import Dump, parse
from commplane.flight.recorder import SCHEMA

SECOND = 1_000_000_000


def call(
    seq: int,
    collective: str = "all_reduce",
    op: str | None = "sum",
    dtype: str | None = "float32",
    nbytes: int = 64,
    *,
    start: float | None = None,
    took: float | None = 0.001,
    state: str = "",
    waiting_for: Sequence[int] = (),
    detail: str = "",
) -> dict[str, Any]:
    """A record; `start` in seconds (by default its number), `took` in seconds or None while it runs."""
    began = seq if start is None else start
    return {
        "seq": seq,
        "collective": collective,
        "op": op,
        "dtype": dtype,
        "nbytes": nbytes,
        "state": state or ("running" if took is None else "done"),
        "started_ns": round(began * SECOND),
        "finished_ns": None if took is None else round((began + took) * SECOND),
        "waiting_for": list(waiting_for),
        "detail": detail,
    }


def group(
    records: Sequence[dict[str, Any]] | None,
    ranks: Sequence[int] = (0, 1, 2),
    purpose: str = "tp",
    backend: str = "torch",
    instance: int = 1,
    fault: dict[str, Any] | None = None,
    problems: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A communicator; `records` of None: its backend could not tell."""
    return {
        "purpose": purpose,
        "ranks": list(ranks),
        "device": "cpu",
        "instance": instance,
        "rank": 0,
        "plan": "p",
        "backends": [backend],
        "state": "failed" if fault else "open",
        "fault": fault,
        "records": {} if records is None else {backend: list(records)},
        "problems": problems or {},
    }


def document(
    rank: int,
    groups: Sequence[dict[str, Any]],
    *,
    at: float = 100.0,
    world_size: int = 3,
    job: str = "job-a",
    reason: str = "SIGUSR1",
    ended: Sequence[int] = (),
    domain: str = "boot",
    wall: float | None = None,
) -> dict[str, Any]:
    """What one rank writes, `at` seconds of its monotonic clock; `wall` is by default an hour later."""
    return {
        "schema": SCHEMA,
        "job": job,
        "rank": rank,
        "world_size": world_size,
        "host": "box",
        "pid": 1000 + rank,
        "versions": {"commplane": "0.1.0"},
        "reason": reason,
        "earlier": [],
        "clock": {
            "domain": domain,
            "monotonic_ns": round(at * SECOND),
            "wall_ns": round((at + 3600.0 if wall is None else wall) * SECOND),
        },
        "ended": list(ended),
        "communicators": list(groups),
    }


def dump(rank: int, groups: Sequence[dict[str, Any]], **changes: Any) -> Dump:
    """As it is read back."""
    return parse(f"flight-{rank}.json", json.dumps(document(rank, groups, **changes)))


def write(folder: Path, rank: int, groups: Sequence[dict[str, Any]], **changes: Any) -> Path:
    """A file as a rank leaves it."""
    made = document(rank, groups, **changes)
    path = folder / f"flight-{made['job']}-rank{rank}-{made['pid']}.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path
