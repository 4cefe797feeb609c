"""A process full of virtual ranks: threads, each with its own client of the store and its own plane.

``python -m commplane.bench.virtual`` takes one JSON object a line on standard input, does it with all of its ranks at once, and
answers with one line. A rank runs what a process of its own would run, `commplane.init` and `Plane.communicator`, over a backend
that costs nothing to build. `commplane.bench.startup` starts these processes and says what is measured.
"""

from __future__ import annotations

import gc
import json
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any

from commplane.api import (
    BackendSpec,
    BuildContext,
    Capability,
    CommBackend,
    Facts,
    ProbeRequest,
    Usable,
    Verdict,
    hookimpl,
)
from commplane.bench.counted import Calls, CountedStore, merge
from commplane.errors import CommplaneError
from commplane.plugins import PluginHost, Registered
from commplane.runtime import Communicator, Plane, init

__all__ = ["IDLE", "IdleBackend", "IdleHost", "VirtualRank", "probe"]

IDLE = "idle"
# Seconds that a store call, and with a factor of two a round, may take: far from what is measured.
_PATIENCE_S = 300.0
_GATHERED_BYTES = 64


def probe(request: ProbeRequest, facts: Facts) -> Verdict:
    """Always usable."""
    return Usable()


class IdleBackend(CommBackend):
    """Nothing to build, nothing to prove but a barrier that returns at once: what remains of a start is the control plane."""

    def open(self, context: BuildContext) -> None:
        """Nothing to build."""

    def close(self) -> None:
        """Nothing to release."""

    def barrier(self) -> None:
        """Waits for nobody."""


class _IdlePlugin:
    @hookimpl
    def commplane_register_comm_backends(self) -> Sequence[BackendSpec]:
        return [
            BackendSpec(
                name=IDLE,
                api=(1, 0),
                factory="commplane.bench.virtual:IdleBackend",
                probe="commplane.bench.virtual:probe",
                capabilities={Capability.BARRIER},
                dtypes=(),
                device="any",
                min_world_size=1,
            )
        ]


class IdleHost(PluginHost):
    """Core's plugin and `IdleBackend`. The backend `torch` is kept back: it would connect every rank with every other."""

    def __init__(self) -> None:
        super().__init__()
        self.register(_IdlePlugin(), IDLE, dist="commplane")

    def backends(self, device: str | None = None) -> dict[str, Registered]:
        """`IdleBackend` alone."""
        return {name: entry for name, entry in super().backends(device).items() if name == IDLE}


class VirtualRank:
    """One rank. Its methods are the steps that can be measured; each is collective over all ranks of its world."""

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._raw = store
        self.store = CountedStore(store)
        self._rank = rank
        self._world_size = world_size
        self._plugins = IdleHost()
        self._plane: Plane | None = None
        self._communicator: Communicator | None = None
        self._formed = 0
        self._agreed = 0

    @property
    def plane(self) -> Plane:
        """There after `init`."""
        assert self._plane is not None
        return self._plane

    def init(self) -> str:
        """`commplane.init`: the settings and plugins are compared, the facts exchanged."""
        self._plane = init(
            store=self.store,
            rank=self._rank,
            world_size=self._world_size,
            plugins=self._plugins,
            config={"timeout": _PATIENCE_S},
        )
        return str(len(self._plane.facts))

    def round(self) -> str:
        """One round in which all ranks say the same."""
        return str(len(self.plane.gather("same", what="a round")))

    def gather(self) -> str:
        """One round in which every rank says something else, of 64 bytes."""
        values = self.plane.gather(f"{self._rank:0{_GATHERED_BYTES}}", what="a gather")
        return f"{len(values)} {values[0]} {values[-1]}"

    def agree(self) -> str:
        """What `Plane.communicator` begins with: every rank publishes its verdicts, and all decide alike what to build."""
        self._agreed += 1
        return " ".join(self.plane.agree(f"agreed{self._agreed}"))

    def communicator(self) -> str:
        """`Plane.communicator` over all ranks: probes, agreement, votes of build and canary, commit."""
        self._formed += 1
        self._communicator = self.plane.communicator(f"startup{self._formed}")
        return self._communicator.plan.digest

    def release(self) -> str:
        """Close the communicator."""
        assert self._communicator is not None
        self._communicator.close()
        return ""

    def close(self) -> str:
        """Close the plane. The next `init` is a new start, with plugins that know of no other."""
        self.plane.close()
        self._plane = None
        self._plugins = IdleHost()
        return ""

    def replay_ready(self, calls: dict[str, list[float]]) -> str:
        """Keys for `replay`, of the size that the values had."""
        self._raw.set(f"replay/{self._rank}", "x" * _each(calls, "multi_get", 3))
        if self._rank == 0:
            self._raw.set("replay/common", "x" * max(_each(calls, "compare_set", 3), _each(calls, "get", 3), 1))
        return ""

    def replay(self, calls: dict[str, list[float]]) -> str:
        """As many calls of each kind as one rank made, of the same size, and nothing else: no waiting, no control plane."""
        raw, mine = self._raw, f"replay/own/{self._rank}"
        keys = [f"replay/{r}" for r in range(self._world_size)]
        do: dict[str, Callable[[], object]] = {
            "set": lambda: raw.set(mine, "x" * _each(calls, "set", 2)),
            "append": lambda: raw.set(mine, "x" * _each(calls, "append", 2)),
            "get": lambda: raw.get("replay/common"),
            "check": lambda: raw.check(keys[: max(1, round(calls["check"][1] / calls["check"][0]))]),
            "compare_set": lambda: raw.compare_set("replay/common", "", ""),
            "add": lambda: raw.add("replay/count", 1),
            "delete_key": lambda: raw.delete_key(mine),
            "multi_get": lambda: raw.multi_get(keys[: max(1, round(calls["multi_get"][1] / calls["multi_get"][0]))]),
        }
        for kind, (count, *_) in calls.items():
            for _i in range(_share(count, self._rank, self._world_size)):
                do[kind]()
        return ""


def _each(calls: dict[str, list[float]], kind: str, column: int) -> int:
    """Bytes of one call."""
    return round(calls[kind][column] / calls[kind][0]) if kind in calls else 0


def _share(count: float, rank: int, world_size: int) -> int:
    """This rank's part of `count` calls of all ranks together."""
    whole, rest = divmod(round(count), world_size)
    return whole + (rank < rest)


class _Ranks:
    """The virtual ranks of this process, a thread each."""

    def __init__(self, host: str, port: int, ranks: Sequence[int], world_size: int) -> None:
        from torch.distributed import TCPStore

        self._done: queue.SimpleQueue[tuple[float, float, str, str | None]] = queue.SimpleQueue()
        self._members: dict[int, VirtualRank] = {}
        self._todo: dict[int, queue.SimpleQueue[Callable[[], str] | None]] = {rank: queue.SimpleQueue() for rank in ranks}
        self._threads = [
            threading.Thread(target=self._serve, args=(todo,), name=f"rank {rank}", daemon=True)
            for rank, todo in self._todo.items()
        ]
        for thread in self._threads:
            thread.start()

        def connect(rank: int) -> str:
            client = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=_PATIENCE_S))
            self._members[rank] = VirtualRank(client, rank, world_size)
            return ""

        for rank, todo in self._todo.items():
            todo.put(partial(connect, rank))
        failed = [failed for *_, failed in (self._done.get() for _ in ranks) if failed is not None]
        if failed:
            raise CommplaneError(f"virtual ranks could not connect: {failed[0]}")

    def _serve(self, todo: queue.SimpleQueue[Callable[[], str] | None]) -> None:
        while (step := todo.get()) is not None:
            began = time.monotonic()
            try:
                said, failed = step(), None
            except Exception:  # reported to who asked for the step, which raises it
                said, failed = "", traceback.format_exc()
            self._done.put((began, time.monotonic(), said, failed))

    def do(self, step: str, arguments: Sequence[Any]) -> dict[str, Any]:
        """One step on all ranks: when the first began and the last ended, what they counted and said."""
        for member in self._members.values():
            member.store.take()
        for rank, todo in self._todo.items():
            todo.put(partial(getattr(self._members[rank], step), *arguments))
        ends = [self._done.get() for _ in self._members]
        calls: dict[str, Calls] = {}
        decided = 0
        for member in self._members.values():
            counted, rounds = member.store.take()
            merge(calls, counted)
            decided += rounds
        return {
            "began": min(e[0] for e in ends),
            "ended": max(e[1] for e in ends),
            "calls": {kind: asdict(c) for kind, c in calls.items()},
            "rounds": decided,
            "said": sorted({e[2] for e in ends}),
            "failed": next((e[3] for e in ends if e[3] is not None), None),
        }

    def end(self) -> None:
        """Let the threads go."""
        for todo in self._todo.values():
            todo.put(None)
        for thread in self._threads:
            thread.join()


def main() -> None:
    """Serve until standard input ends.

    ``{"serve": HOST}`` makes a store, whose port is in the answer; ``host``, ``port``, ``ranks`` and ``world_size`` connect ranks
    with one; ``step`` and ``arguments`` is something for them to do, and the step ``end`` lets them go.
    """
    from torch.distributed import TCPStore

    # The collector would walk through the planes of all ranks of this process, where that of a real rank finds one.
    gc.disable()
    threading.stack_size(1 << 20)  # the default would be gigabytes of addresses
    members: _Ranks | None = None
    store: TCPStore | None = None
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if "serve" in order:
            store = TCPStore(order["serve"], 0, is_master=True, wait_for_workers=False)
            answer = {"port": store.port}
        elif "ranks" in order:
            members = _Ranks(**order)
        elif order["step"] == "end":
            assert members is not None
            members.end()
            members = None
            gc.collect()
        else:
            assert members is not None
            answer = members.do(order["step"], order["arguments"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
