"""Names in shared memory that say whose they are, so that nobody has to guess whether one may be removed.

A name lives for the moment in which a group maps it. If the process that made it is killed just then, the name tells the next
commplane process of this user on this machine that its owner is gone.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from commplane.api.facts import process_start

__all__ = ["SHM_DIRECTORY", "owned_name", "sweep"]

SHM_DIRECTORY = Path("/dev/shm")
_PREFIX = "commplane"
# For owners that cannot be looked up from here (another pid namespace): no exchange lasts this long.
_STALE_AFTER_S = 24 * 3600.0


def _pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def owned_name(kind: str) -> str:
    """A fresh name, without a leading slash: ``commplane-KIND-NAMESPACE-PID-START-TOKEN``. Local; nothing is created."""
    pid = os.getpid()
    return f"{_PREFIX}-{kind}-{_pid_namespace()}-{pid}-{process_start(pid) or 0}-{secrets.token_hex(8)}"


def sweep() -> None:
    """Remove this user's names whose process has ended. Local."""
    if not SHM_DIRECTORY.is_dir():
        return
    namespace = _pid_namespace()
    for path in SHM_DIRECTORY.glob(f"{_PREFIX}-*-*-*-*-*"):
        _kind, owner_namespace, pid, start, _token = path.name.removeprefix(f"{_PREFIX}-").rsplit("-", 4)
        if not (owner_namespace.isdigit() and pid.isdigit() and start.isdigit()):
            continue
        try:
            status = path.stat()
            if status.st_uid != os.getuid():
                continue
            if int(owner_namespace) == namespace:
                gone = process_start(int(pid)) != int(start)
            else:
                gone = time.time() - status.st_mtime > _STALE_AFTER_S
            if gone:
                path.unlink(missing_ok=True)
        except OSError:  # gone meanwhile
            continue
