"""Dumps as they are read back: every rank's file of one job, and what else lies in the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from commplane.api import FlightRecord, GroupKey
from commplane.errors import CommplaneError
from commplane.flight.recorder import SCHEMA

__all__ = ["Dump", "GroupDump", "Note", "RoundDump", "Skipped", "parse", "read_job"]

_TRACE = re.compile(r"trace-.+\.json")


@dataclass(frozen=True)
class GroupDump:
    """One communicator in the dump of one rank; see `commplane.flight.group` for what is in it."""

    key: GroupKey
    instance: int
    state: str
    fault: str
    records: Mapping[str, tuple[FlightRecord, ...]]
    problems: Mapping[str, str]


@dataclass(frozen=True)
class Note:
    """What a plugin noted on a sync round: the how many-th note, and the step in whose wake it was made."""

    number: int
    step: int
    text: str


@dataclass(frozen=True)
class RoundDump:
    """One sync round in the dump of one rank; see `commplane.flight.notes`."""

    name: str
    ranks: tuple[int, ...]
    instance: int
    steps: int
    failed: bool
    notes: tuple[Note, ...]

    @property
    def made(self) -> int:
        """Notes made, with those that are no longer held."""
        return self.notes[-1].number if self.notes else 0


@dataclass(frozen=True)
class Dump:
    """The file of one rank.

    Attributes:
        domain: ranks for which this is equal read one monotonic clock.
        wall_ns: when it was written, in nanoseconds since 1970.
        monotonic_ns: the same moment on the monotonic clock.
        ended: global ranks whose process had ended then.
        earlier: reasons of dumps that this one replaced.
    """

    file: str
    job: str
    rank: int
    world_size: int
    host: str
    pid: int
    versions: Mapping[str, str]
    reason: str
    earlier: tuple[str, ...]
    domain: str
    wall_ns: int
    monotonic_ns: int
    ended: tuple[int, ...]
    groups: tuple[GroupDump, ...]
    rounds: tuple[RoundDump, ...]


@dataclass(frozen=True)
class Skipped:
    """A file that is no dump of the job, and why."""

    file: str
    why: str


def read_job(folder: Path, job: str | None = None) -> tuple[list[Dump], list[Skipped]]:
    """The dumps of a job by rank, and the files that were skipped. Local.

    Args:
        folder: where the files of all ranks are.
        job: its name; if unset, the job that dumped last.

    Raises:
        CommplaneError: the folder cannot be read, or holds no dump of the job; the text says what it holds.
    """
    try:
        names = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not _TRACE.fullmatch(path.name))
    except OSError as error:
        raise CommplaneError(f"folder of flight records {str(folder)!r} cannot be read: {error.strerror}") from error
    dumps: list[Dump] = []
    skipped: list[Skipped] = []
    for path in names:
        try:
            dumps.append(parse(path.name, path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            skipped.append(Skipped(path.name, str(error)))
    jobs = list(dict.fromkeys(d.job for d in sorted(dumps, key=lambda d: d.wall_ns, reverse=True)))
    if not jobs:
        found = "; ".join(f"{s.file}: {s.why}" for s in skipped) or "no JSON file"
        raise CommplaneError(
            f"wanted flight records (flight-*.json) in {str(folder)!r}, found {found}; ranks write them when something fails, "
            f"on SIGUSR1, or in Plane.dump_flight_records, into the folder named by COMMPLANE_FLIGHT_DIR"
        )
    if job is not None and job not in jobs:
        raise CommplaneError(f"no flight records of job {job!r} in {str(folder)!r}: found {', '.join(jobs)}")
    by_rank: dict[int, Dump] = {}
    for dump in sorted((d for d in dumps if d.job == (job or jobs[0])), key=lambda d: d.wall_ns):
        older = by_rank.get(dump.rank)
        if older is not None:
            skipped.append(Skipped(older.file, f"rank {dump.rank} has a later one, {dump.file}"))
        by_rank[dump.rank] = dump
    return [by_rank[r] for r in sorted(by_rank)], skipped


def parse(file: str, text: str) -> Dump:
    """One dump. Pure; ValueError says what is wrong with it."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"not whole, or no JSON: {error}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, dict) or schema.get("name") != SCHEMA["name"]:
        raise ValueError("not a dump of flight records")
    if schema.get("version") != SCHEMA["version"]:
        raise ValueError(
            f"written by another version of commplane: wanted schema {SCHEMA['version']}, found {schema.get('version')}"
        )
    try:
        return Dump(
            file=file,
            job=str(data["job"]),
            rank=int(data["rank"]),
            world_size=int(data["world_size"]),
            host=str(data["host"]),
            pid=int(data["pid"]),
            versions={str(k): str(v) for k, v in data["versions"].items()},
            reason=str(data["reason"]),
            earlier=tuple(str(e["reason"]) for e in data["earlier"]),
            domain=str(data["clock"]["domain"]),
            wall_ns=int(data["clock"]["wall_ns"]),
            monotonic_ns=int(data["clock"]["monotonic_ns"]),
            ended=tuple(int(r) for r in data["ended"]),
            groups=tuple(_group(g) for g in data["communicators"]),
            rounds=tuple(_round(r) for r in data.get("rounds", ())),  # older dumps have none
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"a dump with something missing or of a wrong type: {type(error).__name__}: {error}") from None


def _group(data: Mapping[str, Any]) -> GroupDump:
    fault = data["fault"]
    return GroupDump(
        key=GroupKey(tuple(int(r) for r in data["ranks"]), str(data["device"]), str(data["purpose"])),
        instance=int(data["instance"]),
        state=str(data["state"]),
        fault="" if fault is None else f"{fault['type']}: {fault['text']}",
        records={str(name): tuple(_record(r) for r in records) for name, records in data["records"].items()},
        problems={str(k): str(v) for k, v in data["problems"].items()},
    )


def _round(data: Mapping[str, Any]) -> RoundDump:
    return RoundDump(
        name=str(data["name"]),
        ranks=tuple(int(r) for r in data["ranks"]),
        instance=int(data["instance"]),
        steps=int(data["steps"]),
        failed=bool(data["failed"]),
        notes=tuple(Note(int(number), int(step), str(text)) for number, step, text in data["notes"]),
    )


def _record(data: Mapping[str, Any]) -> FlightRecord:
    known = {f.name: data[f.name] for f in fields(FlightRecord) if f.name in data}
    numbers = ["seq", "nbytes", "started_ns", *(["finished_ns"] if data["state"] != "running" else [])]
    for name in numbers:
        if not isinstance(data[name], int):
            raise TypeError(f"{name} wanted an integer, found {data[name]!r}")
    if data["state"] not in ("running", "done", "failed"):
        raise TypeError(f"state wanted running, done or failed, found {data['state']!r}")
    return FlightRecord(**{**known, "waiting_for": tuple(int(r) for r in data["waiting_for"])})
