"""`commplane.init` for the ranks of a simulation, over a store in this process."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from commplane.config import Config
from commplane.errors import ConfigError
from commplane.plugins import PluginHost
from commplane.runtime.plane import Plane
from commplane.runtime.rendezvous import World
from commplane.testing.simulation import Simulation

__all__ = ["SimulatedStore", "init_simulated"]

# The record of one rank in a round that a user's call makes: the rounds inside of a backend's own step are its own affair.
_RECORD = re.compile(r"plane/\d+/(world|group/\w+/\d+)/\d+/in")


class SimulatedStore:
    """What the control plane uses of a c10d store, in memory.

    Args:
        simulation: says who calls.

    Attributes:
        rounds: rank -> rounds of the control plane that it came to, by a record or by saying that it failed.
        gone: every call raises, as where the store's host was lost.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._data: dict[str, bytes] = {}
        self.rounds: Counter[int] = Counter()
        self.gone = False

    def _look(self) -> dict[str, bytes]:
        if self.gone:
            raise RuntimeError("connection reset by peer")
        return self._data

    def set(self, key: str, value: str) -> None:
        """As in c10d."""
        self._look()[key] = value.encode()

    def append(self, key: str, value: str) -> None:
        """As in c10d."""
        if _RECORD.fullmatch(key):
            self.rounds[self._simulation.rank] += 1
        data = self._look()
        data[key] = data.get(key, b"") + value.encode()

    def get(self, key: str) -> bytes:
        """As in c10d, but that a key which does not exist is an error at once."""
        return self._look()[key]

    def check(self, keys: Sequence[str]) -> bool:
        """As in c10d."""
        data = self._look()
        return all(key in data for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """As in c10d, where a key that does not exist counts as empty."""
        data = self._look()
        if data.get(key, b"") == expected.encode():
            data[key] = value.encode()
        return data.get(key, expected.encode())

    def add(self, key: str, amount: int) -> int:
        """As in c10d."""
        data = self._look()
        data[key] = str(int(data.get(key, b"0")) + amount).encode()
        return int(data[key])

    def delete_key(self, key: str) -> bool:
        """As in c10d."""
        return self._look().pop(key, None) is not None

    def has_extended_api(self) -> bool:
        """Like a TCPStore."""
        return True

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """As in c10d."""
        data = self._look()
        return [data[key] for key in keys]


class _SimulatedPlane(Plane):
    def __init__(self, simulation: Simulation, *args: Any) -> None:
        self._simulation = simulation
        super().__init__(*args)

    def _dead(self, ranks: Sequence[int]) -> Sequence[int]:
        """All virtual ranks are one process: the simulation knows who is dead, once the ranks have met."""
        return () if getattr(self, "facts", None) is None else [r for r in ranks if r in self._simulation.dead]


def init_simulated(
    simulation: Simulation, store: Any, rank: int, world_size: int, *, config: Mapping[str, Any], plugins: PluginHost
) -> Plane:
    """What `commplane.init` does, for one rank of a simulation. Collective over its ranks."""
    problem: ConfigError | None = None
    try:
        settings = Config.load(config, environ={})
    except ConfigError as error:  # as in `init`: the others are told
        problem, settings = error, Config()
    world = World(store, rank, world_size, "simulation", simulation.clock)
    return _SimulatedPlane(simulation, world, settings, plugins, problem)
