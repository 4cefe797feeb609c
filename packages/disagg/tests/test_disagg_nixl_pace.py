"""The pauses between calls into NIXL."""

from __future__ import annotations

import time

import pytest

from commplane_disagg.engines.nixl_pace import Pace

pytestmark = pytest.mark.timeout(10)


def test_pauses_of_idle_calls_grow_to_the_longest_and_a_busy_call_ends_them() -> None:
    pace = Pace(longest=1e-3, spin=10.0)
    begun = time.perf_counter() + 1.0  # in time to come, so that no call counts as long, however slow the machine
    pauses = [pace.after(begun) for _ in range(12)]
    assert 0 < pauses[0] < pauses[1] < pauses[-1] == 1e-3
    assert pace.after(time.perf_counter() - 1.0) == 0
    assert pace.after(begun) == 0  # still within the spin


def test_without_a_spin_the_pauses_begin_anew_after_a_busy_call() -> None:
    pace = Pace(longest=1e-3, spin=0.0)
    begun = time.perf_counter() + 1.0
    before = [pace.after(begun) for _ in range(3)]
    pace.busy()
    assert [pace.after(begun) for _ in range(3)] == before
