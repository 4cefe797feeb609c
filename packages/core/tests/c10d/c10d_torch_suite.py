"""torch's own tests of process groups, run against commplane: ``pytest c10d_torch_suite.py``, or ``nox -s c10d``.

Not collected by itself: it wants the package expecttest, as torch's test helpers do, and makes a world for each of its tests.
They were written with a list of backends in mind that each is for. Here all that are for Gloo are run, over commplane.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist

import commplane.c10d  # noqa: F401  with torch 2.4 nobody else registers it

# Read when torch's tests are imported. Three ranks, because many tests have a sub-group that is not the whole; one a GPU, if any.
os.environ.setdefault("WORLD_SIZE", str(min(3, torch.cuda.device_count()) if torch.cuda.is_available() else 3))
os.environ.setdefault("TEMP_DIR", tempfile.mkdtemp(prefix="commplane-torch-suite-"))
os.environ["BACKEND"] = "gloo"
from torch.testing._internal.distributed import distributed_test

SKIPPED = {
    "test_monitored_barrier": "torch takes a group of Gloo for monitored_barrier, by the name of the group's backend",
    "test_get_backend": "torch compares the name with the one that Gloo has",
    "test_barrier_timeout": "holds, but the words of the error are compared, and ours name the ranks that did not come",
}
"""Tests of torch that cannot hold for commplane, by the beginning of their names, and why."""


class TestDistributedOverCommplane(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
    """What torch asks of Gloo."""

    def setUp(self) -> None:
        reason = next((why for name, why in SKIPPED.items() if self._testMethodName.startswith(name)), None)
        if reason is not None:
            pytest.skip(reason)
        super().setUp()
        # Forked where there is no GPU: torch is then loaded once, not in each process of each test.
        how = "spawn" if torch.cuda.is_available() else "fork"
        self._start_processes(torch.multiprocessing.get_context(how).Process)

    @classmethod
    def _run(cls, *args: Any, **named: Any) -> None:
        init = dist.init_process_group
        # In this process alone, and also where a test makes its default group again.
        distributed_test.dist.init_process_group = lambda *a, backend="", **n: init(*a, backend="commplane", **n)
        super()._run(*args, **named)
