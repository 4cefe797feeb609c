"""For tests of plugins and of commplane itself: a plugin host without discovery, threads as ranks, processes as ranks.

Needs torch; no pytest.
"""

from __future__ import annotations

from commplane.plugins import PluginHost
from commplane.testing.canary import without_canary
from commplane.testing.leftovers import shm_leftovers
from commplane.testing.processes import Outcome, run_processes
from commplane.testing.simulated_plane import SimulatedStore, init_simulated
from commplane.testing.simulated_rounds import SimulatedRound, SimulatedRounds
from commplane.testing.simulation import Killed, Simulation
from commplane.testing.threads import run_threads

__all__ = [
    "Killed",
    "Outcome",
    "PluginHost",
    "SimulatedRound",
    "SimulatedRounds",
    "SimulatedStore",
    "Simulation",
    "init_simulated",
    "run_processes",
    "run_threads",
    "shm_leftovers",
    "without_canary",
]
