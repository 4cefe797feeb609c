"""Many ranks of one cache in one thread, with everything drawn from a seed: ``python -m commplane_cache.simulator``.

`workload` is what all ranks are told alike, `rank` an engine with its cache whose storage, copies, memory and clock differ from
the others', `world` plays them step by step and compares them, `mistakes` are caches that decide something alone: all are found.
"""

from __future__ import annotations

from commplane_cache.simulator.mistakes import MISTAKES
from commplane_cache.simulator.world import Outcome, Scenario, simulate

__all__ = ["MISTAKES", "Outcome", "Scenario", "simulate"]
