"""Where dumps lie: the folder, the names, and how a file gets there."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["KEPT", "Folder", "dump_name", "new_job"]

KEPT = 64
"""Dumps that stay in the default folder; those of the present job are never removed."""

_NAME = re.compile(r"flight-(?P<job>.+)-rank\d+-\d+\.json")
_PARTIAL = re.compile(r"\.flight-.+\.part")
# A file that was begun so long ago belongs to a process that did not come to rename it.
_STALE_S = 3600.0


def new_job() -> str:
    """A name for a job that is about to start: its time in UTC, and what no other job has. Local; one rank's is used by all."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"


def dump_name(job: str, rank: int) -> str:
    """The file of a rank, one for this process however often it dumps."""
    return f"flight-{job}-rank{rank}-{os.getpid()}.json"


class Folder:
    """A folder for dumps.

    Args:
        named: the one the user named: made if it is missing, otherwise used as it is. If unset, one of this user's own under the
            folder for temporary files, which nobody else can read and from which old dumps are removed.
    """

    def __init__(self, named: str | None) -> None:
        self.default = not named
        base = Path(named).expanduser() if named else Path(tempfile.gettempdir()) / f"commplane-flight-{os.getuid()}"
        self.path = base.absolute()

    def write(self, name: str, document: Mapping[str, Any], job: str) -> Path:
        """Put a JSON file there, whole or not at all. Raises OSError."""
        self._make()
        target = self.path / name
        partial = self.path / f".{name}.{secrets.token_hex(4)}.part"
        try:
            with open(partial, "x", encoding="utf-8", opener=lambda p, flags: os.open(p, flags, 0o600)) as file:
                json.dump(document, file, separators=(",", ":"))
            partial.rename(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if self.default:
            self._prune(job)
        return target

    def _make(self) -> None:
        self.path.mkdir(mode=0o700, parents=not self.default, exist_ok=True)
        if not self.default:
            return
        # Anybody may make a folder of this name before us, and would then read, or choose, what is in it.
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(
                f"{str(self.path)!r} wants to be a folder of user {os.getuid()}, found one of user {found.st_uid} or a link: "
                f"remove it, or set COMMPLANE_FLIGHT_DIR"
            )
        if found.st_mode & 0o077:
            self.path.chmod(0o700)

    def _prune(self, job: str) -> None:
        """Remove the oldest dumps of other jobs, and files that were never finished."""
        dumps: list[tuple[float, Path]] = []
        for path in self.path.iterdir():
            try:
                changed = path.stat().st_mtime
                if _PARTIAL.fullmatch(path.name) and time.time() - changed > _STALE_S:
                    path.unlink()
            except FileNotFoundError:  # another process prunes too
                continue
            if _NAME.fullmatch(path.name):
                dumps.append((changed, path))
        for _, path in sorted(dumps, reverse=True)[KEPT:]:
            if _NAME.fullmatch(path.name)["job"] != job:  # type: ignore[index]
                path.unlink(missing_ok=True)
