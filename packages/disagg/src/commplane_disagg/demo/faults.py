"""What may go wrong on purpose, between the first room that arrives and the last one that is computed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from torch.distributed import Store

from commplane_disagg.demo.job import DECODE_NODE, FAULTS, Options
from commplane_disagg.demo.launch import Process
from commplane_disagg.demo.network import Node, link

__all__ = ["ARRIVED", "DONE", "Fault"]

ARRIVED = "a room has arrived"
"""Key that the first decode rank writes; then the fault happens."""

DONE = "the fault has happened"
"""Key that prefill ranks wait for before the last prompt, so that it always meets the fault."""

_UNPLUGGED = 2.0
"""Seconds without the cable; longer than TCP waits before it tries again, shorter than anybody's patience."""


class Fault:
    """The fault that the options name, as who started the ranks brings it about: call `look` now and then."""

    def __init__(self, options: Options, processes: Sequence[Process], nodes: Sequence[Node], store: Store) -> None:
        self._name, self._processes, self._nodes, self._store = options.fault, processes, nodes, store
        self._happened = False
        self._again: float | None = None

    def look(self) -> str | None:
        """Bring it about if it is time: what was done, once."""
        if self._again is not None and time.monotonic() >= self._again:
            self._again = None
            link(self._nodes[1], up=True)
            return f"the cable of {self._nodes[1].address} is plugged in again"
        if not self._name or self._happened or not self._store.check([ARRIVED]):
            return None
        self._happened = True
        what = self._act()
        self._store.set(DONE, "")
        return what

    def _act(self) -> str:
        prefill = [process for process in self._processes if process.job.side == "prefill"]
        victim = next(p for p in self._processes if p.job.node == DECODE_NODE) if self._name == "kill-decode" else prefill[-1]
        if self._name.startswith("kill"):
            victim.kill()
            return f"{victim.name} was killed"
        if self._name == "stop-prefill":
            os.kill(victim.pid, signal.SIGSTOP)
            return f"{victim.name} was stopped"
        if self._name in ("unplug", "cut"):
            link(self._nodes[1], up=False)
            self._again = time.monotonic() + _UNPLUGGED if self._name == "unplug" else None
            return f"the cable of {self._nodes[1].address} was pulled"
        return FAULTS[self._name]  # the prefill ranks do it themselves, once they are told
