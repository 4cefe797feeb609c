"""A /dev/shm of a test's own, of a size that the test says."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def own_shm(size: str, *, full: bool = False) -> list[str]:
    """A command prefix: run in a mount namespace whose /dev/shm is private and of `size`, and has no room left if `full`."""
    fill = "cat /dev/zero >/dev/shm/something 2>/dev/null;" if full else ""
    return ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && {{ {fill} exec "$@"; }}', "sh"]


def _may_unshare() -> bool:
    """Whether this user may make such a namespace: root, or a container that allows it."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*own_shm("16m"), "true"], capture_output=True, check=False).returncode == 0


needs_namespaces = pytest.mark.skipif(not _may_unshare(), reason="wants the right to create mount namespaces (root)")
