"""Which process this is, and whether another one on this machine has ended for sure."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from commplane_disagg.channel.messages import Identity

__all__ = ["has_ended", "identity", "machine"]


def machine() -> str:
    """A text that is equal for two processes exactly if a pid means the same process to both."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"


def identity(name: str, instance: str | None = None) -> Identity:
    """That of this process; a new random instance unless one is given."""
    found = _state(os.getpid())
    started = found[1] if found else 0
    return Identity(name=name, instance=instance or secrets.token_hex(8), machine=machine(), pid=os.getpid(), started=started)


def has_ended(peer: Identity) -> bool:
    """Whether that process is proved to be gone: it is of this machine, and its pid is free, a corpse or another process.

    False means not known: it lives, or it is on another machine. A connection that broke proves nothing: the process may write.
    """
    if not peer.pid or not peer.started or peer.machine != machine():
        return False
    found = _state(peer.pid)
    if found is None:
        return True
    state, started, threads = found
    if not started:
        return False
    # A corpse whose other threads still run is none: its main thread alone has ended.
    return started != peer.started or (state in "ZX" and threads <= 1)


def _state(pid: int) -> tuple[str, int, int] | None:
    """State, start time and number of threads of a process; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None if _is_free(pid) else ("?", 0, 0)
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return fields[0], int(fields[19]), int(fields[17])


def _is_free(pid: int) -> bool:
    """Whether no process has this pid; /proc alone may hide those of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # the latter: of no process that there could be, so nothing is proved
        return False
    return False
