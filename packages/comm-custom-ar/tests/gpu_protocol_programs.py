# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/cuda as programs of gpu_protocol_model.py: one block of each rank, a vector a tile or slot.

`push` is one_shot_push.h and the fused norm, `push_twice` two_shot_push.h, `tiles` exchange_tiles() of tiles.h, `broadcast` the
same with one sender, `pull` and `pull_twice` all_reduce_pull.h, `barrier` the words about the call alone. session.h is `say` and
`hear`.
`python gpu_protocol_programs.py` is the long search.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gpu_protocol_model import EMPTY, End, Found, Program, Read, Step, Write, explore


@dataclass(frozen=True)
class Protocol:
    """As it is; every other value is a mistake."""

    ring: int = 4  # kRing
    parities: int = 2  # of Lamport slots
    mail_parities: int = 2
    sums_at: int = 8  # vectors of a source that are parts; behind them are sums
    empties: bool = True  # the owner of a slot empties it when it has read it
    empties_in_time: bool = True  # or only after it has said its next call
    hears: bool = True  # every call waits for what all peers call
    release: bool = True  # of flags
    acquire: bool = True
    fence: bool = True  # at the end of a kernel
    reads_first: bool = True  # or raises the flag of tile t + 2 in front of reading tile t
    root_waits: bool = True  # and so do the others raise flags for it
    last_hop: bool = True  # of a pull
    first_hop: bool = True


PRESENT = Protocol()


@dataclass(frozen=True)
class Call:
    """One call; `count` is vectors of a push, of each rank's part where it pushes twice, and tiles of the rest."""

    kind: str
    count: int = 1
    root: int = 0

    def __str__(self) -> str:
        return f"{self.kind}({self.count})" + (f" of rank {self.root}" if self.kind == "broadcast" else "")


@dataclass
class _Rank:
    """Where a rank's block stands, as BlockState has it, and what its two agents do."""

    rank: int
    world: int
    protocol: Protocol
    places: dict[tuple[object, ...], int]
    initial: list[tuple[str, str | int]]
    data: list[Step] = field(default_factory=list)
    control: list[Step] = field(default_factory=list)
    owed: list[Step] = field(default_factory=list)
    calls: int = 0
    tiles: int = 0

    @property
    def peers(self) -> list[int]:
        return [r for r in range(self.world) if r != self.rank]

    def place(self, *name: object, value: str | int = EMPTY) -> int:
        if name not in self.places:
            self.places[name] = len(self.initial)
            self.initial.append((" ".join(map(str, name)), value))
        return self.places[name]

    # --- session.h ---

    def mail(self, owner: int, source: int) -> int:
        return self.place("mail of", source, "at", owner, "parity", self.calls % self.protocol.mail_parities)

    def say(self, to: list[Step]) -> None:
        to += [Write(f"says call {self.calls} to {p}", self.mail(p, self.rank), f"call {self.calls}") for p in self.peers]

    def hear(self, to: list[Step]) -> None:
        for p in self.peers if self.protocol.hears else []:
            at = self.mail(self.rank, p)
            to.append(Read(f"hears {p}", at, f"call {self.calls}", waits=True))
            to.append(Write(f"empties the mail of {p}", at, EMPTY))

    def end(self, done: int) -> None:
        self.data.append(End(self.rank, self.protocol.fence))
        self.control.append(End(self.rank, self.protocol.fence))
        self.calls += 1
        self.tiles += done

    # --- one_shot_push.h, two_shot_push.h ---

    def slot(self, owner: int, source: int, vector: int) -> int:
        return self.place("slot of", source, "at", owner, "parity", self.calls % self.protocol.parities, "vector", vector)

    def fill(self, vector: int, what: str) -> None:
        for p in self.peers:
            self.data.append(Write(f"sends {what} to {p}", self.slot(p, self.rank, vector), f"{what} {self.rank}.{self.calls}"))

    def empty(self, vector: int, what: str) -> None:
        for p in self.peers:
            slot = self.slot(self.rank, p, vector)
            self.data.append(Read(f"takes {what} of {p}", slot, f"{what} {p}.{self.calls}", waits=True))
            if self.protocol.empties:
                (self.data if self.protocol.empties_in_time else self.owed).append(Write(f"empties the slot of {p}", slot, EMPTY))

    def begin_push(self) -> None:
        self.say(self.control)
        self.data += self.owed
        self.owed = []
        self.hear(self.control)

    def push(self, count: int) -> None:
        self.begin_push()
        for i in range(count):
            self.fill(i, "all")
        for i in range(count):
            self.empty(i, "all")
        self.end(0)

    def push_twice(self, count: int) -> None:
        """Slots for sums lie behind those for parts. A round is sent, summed a round later, its sums taken a round after that."""
        self.begin_push()
        sums = self.protocol.sums_at
        for t in range(count + 2):
            if t < count:
                self.fill(t, "part")
            if 1 <= t <= count:
                self.empty(t - 1, "part")
                self.fill(sums + t - 1, "sum")
            if t >= 2:
                self.empty(sums + t - 2, "sum")
        self.end(0)

    # --- tiles.h ---

    def flag(self, owner: int, source: int) -> int:
        return self.place("flag of", source, "at", owner, value=0)

    def raise_flags(self, value: int) -> None:
        self.data += [
            Write(f"raises flag {value} for {p}", self.flag(p, self.rank), value, self.protocol.release) for p in self.peers
        ]

    def wait(self, value: int) -> None:
        self.data += [
            Read(f"waits for flag {value} of {p}", self.flag(self.rank, p), value, True, True, self.protocol.acquire)
            for p in self.peers
        ]

    def tile(self, owner: int, source: int, number: int) -> int:
        return self.place("tile of", source, "at", owner, "place", number % self.protocol.ring)

    def send(self, number: int) -> None:
        for p in self.peers:
            self.data.append(Write(f"fills tile {number} of {p}", self.tile(p, self.rank, number), f"{self.rank} tile {number}"))

    def take(self, number: int, senders: Iterable[int]) -> None:
        for p in senders:
            self.data.append(Read(f"reads tile {number} of {p}", self.tile(self.rank, p, number), f"{p} tile {number}"))

    def exchange(self, count: int, root: int | None) -> None:
        sends = root is None or root == self.rank
        senders = [p for p in self.peers if root is None or p == root]
        waits = self.protocol.root_waits or root is None
        self.say(self.data)
        taken = 0
        for t in range(count + 1):
            late = not self.protocol.reads_first and t < count
            if t < count:
                if sends:
                    self.send(self.tiles + t)
                self.raise_flags(self.tiles + t + 1)
            if t > 0:
                if waits or root != self.rank:
                    self.wait(self.tiles + t)
                while taken < (t - 1 if late else t):
                    self.take(self.tiles + taken, senders)
                    taken += 1
        self.hear(self.data)
        self.end(count)

    # --- all_reduce_pull.h ---

    def pull(self, twice: bool) -> None:
        """The caller writes its tensor in front of a call, and looks at it after."""
        for c in range(self.world):
            self.data.append(
                Write("has a new input", self.place("part", c, "of", self.rank), f"{self.rank} in call {self.calls}")
            )
        self.say(self.data)
        self.raise_flags(self.tiles + 1)
        if self.protocol.first_hop:
            self.wait(self.tiles + 1)
        parts = [self.rank] if twice else range(self.world)
        for c in parts:
            for r in range(self.world):
                self.data.append(Read(f"reads part {c} of {r}", self.place("part", c, "of", r), f"{r} in call {self.calls}"))
        if twice:
            for r in range(self.world):
                self.data.append(
                    Write(f"writes the sum to {r}", self.place("part", self.rank, "of", r), f"sum of call {self.calls}")
                )
        self.raise_flags(self.tiles + 2)
        if self.protocol.last_hop:
            self.wait(self.tiles + 2)
        self.hear(self.data)
        for c in range(self.world) if twice else ():
            self.data.append(Read("looks at the result", self.place("part", c, "of", self.rank), f"sum of call {self.calls}"))
        self.end(2)

    def call(self, call: Call) -> None:
        if call.kind == "push":
            self.push(call.count)
        elif call.kind == "tiles":
            self.exchange(call.count, None)
        elif call.kind == "broadcast":
            self.exchange(call.count, call.root % self.world)
        elif call.kind == "push_twice":
            self.push_twice(call.count)
        elif call.kind in ("pull", "pull_twice"):
            self.pull(call.kind == "pull_twice")
        else:
            assert call.kind == "barrier"
            self.say(self.data)
            self.hear(self.data)
            self.end(0)


def program(world: int, calls: Sequence[Call], protocol: Protocol = PRESENT) -> Program:
    """What `world` ranks do that make the same calls."""
    places: dict[tuple[object, ...], int] = {}
    initial: list[tuple[str, str | int]] = []
    agents: list[list[Step]] = []
    for rank in range(world):
        own = _Rank(rank, world, protocol, places, initial)
        for call in calls:
            own.call(call)
        agents += [own.data, own.control]
    return Program(agents, [i // 2 for i in range(2 * world)], initial)


KINDS = (
    Call("push"),
    Call("push", 2),
    Call("tiles"),
    Call("tiles", 2),
    Call("push_twice"),
    Call("push_twice", 2),
    Call("broadcast", 1, 0),
    Call("broadcast", 2, -1),
    Call("pull"),
    Call("pull_twice"),
    Call("barrier"),
)


def sequences(calls: Sequence[Call], length: int) -> list[tuple[Call, ...]]:
    """Every ordered choice of `length` calls, the same one again included."""
    return list(itertools.product(calls, repeat=length))


def search(world: int, programs: Iterable[Sequence[Call]], protocol: Protocol = PRESENT) -> Found:
    """Explores programs one after the other, up to the first that goes wrong: the sum of their results."""
    total = Found()
    for calls in programs:
        found = explore(program(world, calls, protocol))
        total.states += found.states
        total.ends += found.ends > 0
        if found.kind:
            total.kind, total.trace = found.kind, found.trace
            total.text = f"{world} ranks, {', '.join(map(str, calls))}: {found.text}"
            break
    return total


def main() -> int:
    """The searches that take minutes."""
    for name, world, programs in (
        ("2 ranks, every four of the kinds with one tile", 2, sequences([k for k in KINDS if k.count == 1], 4)),
        ("3 ranks, every pair", 3, sequences(KINDS, 2)),
        ("3 ranks, each three times", 3, [(k,) * 3 for k in KINDS]),
    ):
        begun = time.monotonic()
        found = search(world, programs)
        if found.kind or found.ends != len(programs):
            print(found)
            return 1
        print(f"{name}: {len(programs)} programs, {found.states} states, {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
