"""Names in shared memory that say whose they are, so that nobody has to guess whether one may be removed.

A name lives for the moment in which a group maps it. If the process that made it is killed just then, the name tells the next
commplane process of this user on this machine that its owner is gone. Files that several hosts see may have such names, too: a
name says whether its owner can be looked up from here at all.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from commplane.api.facts import has_ended, process_start

__all__ = ["SHM_DIRECTORY", "Owner", "is_abandoned", "owned_name", "owner", "sweep"]

SHM_DIRECTORY = Path("/dev/shm")
_PREFIX = "commplane"
# For owners that cannot be looked up from here (another machine, boot or pid namespace): no exchange lasts this long.
_STALE_AFTER_S = 24 * 3600.0


def _pid_namespace() -> int:
    """A number for where process ids mean the same as here: one boot of one machine, one pid namespace of it."""
    # Both: the first namespace of every machine has the same inode, and another boot counts its process ids anew.
    return _number_of(_read_boot_id(), _read_namespace())


def _read_boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return os.uname().nodename


def _read_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


@lru_cache(maxsize=8)
def _number_of(boot_id: str, namespace: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{boot_id}/{namespace}".encode()).digest()[:8], "big")


def owned_name(kind: str) -> str:
    """A fresh name, without a leading slash: ``commplane-KIND-NAMESPACE-PID-START-TOKEN``. Local; nothing is created."""
    pid = os.getpid()
    return f"{_PREFIX}-{kind}-{_pid_namespace()}-{pid}-{process_start(pid) or 0}-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Owner:
    """Who made a name. `gone`: whether that process is known to have ended; `here`: whether it can be looked up from here."""

    pid: int
    here: bool
    gone: bool


def owner(name: str) -> Owner | None:
    """The owner of a name, or None if it is not one of ours. Local."""
    parts = name.split("-")
    if len(parts) != 6 or parts[0] != _PREFIX or not all(part.isdigit() for part in parts[2:5]):
        return None
    namespace, pid, start = map(int, parts[2:5])
    here = namespace == _pid_namespace()
    return Owner(pid, here, here and has_ended(pid, start))


def is_abandoned(path: Path) -> bool:
    """Whether the name is one of ours whose process has ended, or cannot be looked up from here and is untouched for a day.

    Local. Raises `OSError` where the file cannot be looked at, such as one that is gone meanwhile.
    """
    who = owner(path.name)
    if who is None:
        return False
    return who.gone or (not who.here and time.time() - path.stat().st_mtime > _STALE_AFTER_S)


def sweep() -> None:
    """Remove this user's names whose process has ended. Local."""
    try:
        paths = list(SHM_DIRECTORY.glob(f"{_PREFIX}-*"))
    except OSError:  # no such directory, or no file descriptor left to read it with: the next start does it
        return
    for path in paths:
        try:
            if is_abandoned(path) and path.stat().st_uid == os.getuid():
                path.unlink(missing_ok=True)
        except OSError:  # gone meanwhile
            continue
