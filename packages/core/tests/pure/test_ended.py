"""Who counts as ended: only who is known to have. A process without file descriptors cannot look, and takes no peer for dead."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from commplane.api.facts import has_ended, process_start

pytestmark = pytest.mark.skipif(process_start(os.getpid()) is None, reason="wants /proc")

EXHAUSTED = """
import os, resource, sys
from commplane.api.facts import has_ended, process_start
from commplane.api.shm import owned_name, owner, sweep
pid, start, name = os.getpid(), process_start(os.getpid()), owned_name("test")
before = (has_ended(pid, start), owner(name).gone, has_ended(pid, start + 1))
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
exhausted = (has_ended(pid, start), owner(name).gone)
sweep()
os.close(held.pop())
sys.exit(0 if before == (False, False, True) and exhausted == (False, False) else 1)
"""


def test_a_process_without_file_descriptors_takes_nobody_for_dead() -> None:
    assert subprocess.run([sys.executable, "-c", EXHAUSTED], check=False).returncode == 0


def test_a_process_that_was_killed_has_ended_as_a_zombie_and_when_it_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    start = process_start(child.pid)
    assert start is not None and not has_ended(child.pid, start)
    child.kill()
    while process_start(child.pid) is not None:
        time.sleep(0.001)
    assert has_ended(child.pid, start)  # nobody has waited for it yet
    child.wait()
    assert has_ended(child.pid, start)
