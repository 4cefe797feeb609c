"""The flight recorder of one plane: what is written when something fails, on a signal, or on request."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from commplane.agree.bounded import call_bounded
from commplane.api import CommBackend, GroupKey
from commplane.flight.folder import Folder, dump_name
from commplane.flight.group import GroupFlight
from commplane.flight.notes import RoundNotes
from commplane.notice import notice

__all__ = ["SCHEMA", "FlightRecorder"]

SCHEMA = {"name": "commplane-flight", "version": 1}
"""What a dump begins with; the version counts changes that a reader of the one before would take wrong."""

_log = logging.getLogger("commplane")

# A dump holds up what failed: a file system that does not answer may not do so for ever.
_WRITE_S = 10.0
# Communicators that failed and were closed since: the last so many are in every later dump; and so it is with sync rounds.
_REMEMBERED = 8


class FlightRecorder:
    """Every communicator and sync round of one plane on this rank. Local; any thread.

    Args:
        job: name of the plane, equal on all its ranks.
        rank: global rank.
        world_size: number of ranks of the plane.
        length: calls held for each backend of a communicator, and notes for each sync round; with 0, nothing is recorded and only
            `dump` writes.
        folder: where dumps go.
        versions: what runs here, by name; for people.
        ended: global ranks whose process is known to have ended.
    """

    def __init__(
        self,
        job: str,
        rank: int,
        world_size: int,
        length: int,
        folder: Folder,
        versions: Mapping[str, str],
        ended: Callable[[], Sequence[int]],
    ) -> None:
        self.job = job
        self.length = length
        self._rank = rank
        self._world_size = world_size
        self._folder = folder
        self._versions = dict(versions)
        self._ended = ended
        self._groups: list[GroupFlight] = []
        self._rounds: list[tuple[int, RoundNotes]] = []
        self._earlier: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def group(self, key: GroupKey, instance: int, rank: int, plan: str, backends: Mapping[str, CommBackend]) -> GroupFlight:
        """The records of a new communicator; see `GroupFlight`."""
        out = GroupFlight(key, instance, rank, plan, backends, self.length, self.dump_for, self._closed)
        self._groups.append(out)
        return out

    def round(self, instance: int, notes: RoundNotes) -> None:
        """A new sync round, the how many-th with its name and ranks: its notes are in every dump from now on."""
        notes.hold(self.length)
        self._rounds = [*self._rounds_shown(), (instance, notes)]

    def _rounds_shown(self) -> list[tuple[int, RoundNotes]]:
        failed = [one for one in self._rounds if one[1].closed and one[1].failed][-_REMEMBERED:]
        return [one for one in self._rounds if not one[1].closed or one in failed]

    def _closed(self, group: GroupFlight) -> None:
        gone = [g for g in self._groups if g.closed]
        forgotten = [g for g in gone if not g.faulted] + [g for g in gone if g.faulted][:-_REMEMBERED]
        self._groups = [g for g in self._groups if g not in forgotten]

    def dump(self, reason: str) -> Path:
        """Write this rank's file anew. Raises OSError; what a backend cannot tell is noted in the file."""
        with self._lock:
            when = time.time_ns()
            document = self._document(reason)
            path = self._folder.write(dump_name(self.job, self._rank), document, self.job)
            self._earlier = [*self._earlier, {"reason": reason, "wall_ns": when}][-_REMEMBERED:]
        return path

    def try_dump(self, reason: str) -> Path | None:
        """`dump`, where it must not fail: within a deadline; a failure is a notice. None also where nothing is recorded."""
        if not self.length:
            return None
        try:
            return call_bounded(lambda: self.dump(reason), _WRITE_S, "writing flight records")
        except Exception as error:  # whatever it is, the caller has an error of its own that matters more
            notice(f"flight records could not be written to {str(self._folder.path)!r}: {type(error).__name__}: {error}")
            return None

    def dump_for(self, error: BaseException, reason: str) -> Path | None:
        """`try_dump` because of `error`; the file is named in the log and in a note of the error, which tracebacks show."""
        path = self.try_dump(reason)
        if path is not None:
            _log.error("%s; flight records in %s", reason, path)
            _add_note(error, f"flight records: {path} (of all ranks: commplane trace {path.parent} --job {self.job})")
        return path

    def dump_once(self, error: BaseException, reason: str) -> None:
        """`dump_for`, unless the records were dumped because of `error` already."""
        name = dump_name(self.job, self._rank)
        if not any(name in text for text in (str(error), *getattr(error, "__notes__", ()))):
            self.dump_for(error, reason)

    def dump_on_signal(self) -> None:
        """For `commplane.flight.signals`."""
        path = self.try_dump("SIGUSR1")
        if path is not None:
            _log.warning("SIGUSR1: flight records in %s", path)

    def _document(self, reason: str) -> dict[str, Any]:
        before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
        return {
            "schema": SCHEMA,
            "job": self.job,
            "rank": self._rank,
            "world_size": self._world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": self._versions,
            "reason": reason,
            "earlier": self._earlier,
            "clock": {"domain": _clock_domain(), "monotonic_ns": (before + after) // 2, "wall_ns": wall},
            "ended": list(self._ended()),
            "communicators": [g.to_json() for g in list(self._groups)],
            "rounds": [notes.to_json(instance) for instance, notes in self._rounds_shown()],
        }


def _add_note(error: BaseException, text: str) -> None:
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:  # before Python 3.11, where tracebacks do not show it: `dump_once` looks for it all the same
        vars(error).setdefault("__notes__", []).append(text)


def _clock_domain() -> str:
    """Processes for which this is equal read one monotonic clock: the same boot, and the same time namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/time').readlink()}"
    except OSError:
        return f"{socket.gethostname()}/{os.getpid()}"
