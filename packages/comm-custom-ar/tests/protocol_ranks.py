# SPDX-License-Identifier: Apache-2.0
"""What the collectives are made of: comm.h and pipeline.h as operations of the model, and the memory that calls share.

Memory of a program, all of it used by all of its calls, so that calls meet in it:

    slot[r][k][s]      piece s of staging slot k of rank r. A fill and a reduction into a slot count as writes of the whole slot,
                       for the pieces of two collectives begin at different bytes; a read is of the pieces read.
    words[r][k]        descriptor and address in flag line k of rank r, written with the number of their step
    x[r][c][s]         the input of rank r: chunk c, slice s. Peers have it mapped. In place, also the output.
    y[r][c][s]         the output of rank r where it is not in place. Single copy: peers read it.

After every call its rank looks at the result and then overwrites both buffers: x holds the input of the next call.

`Protocol` has the constants of comm.h and the mistakes that the tests make on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protocol_model import Data, Load, Location, Operation, Store


@dataclass(frozen=True)
class Protocol:
    """What comm.h says; every value but the defaults is a mistake, except a smaller `ring` where few steps are open."""

    ring: int = 4  # kRing
    ahead: int = 1  # chunks that a pipeline fills before it waits for the one before them; rule (R)
    release: bool = True  # publish() stores the flag with release
    acquire: bool = True  # await() loads it with acquire at first
    acquire_again: bool = True  # ... and after the relaxed loads of bounded_wait()
    words_first: bool = True  # publish() stores descriptor and address before the flag
    await_all: bool = True  # or the left neighbour alone
    root_awaits: bool = True  # or the root of a broadcast only sends
    compare: bool = True  # await() compares descriptors; not with COMMPLANE_CAR_NO_COMPARE
    wait_first: bool = True  # or works on a step before it awaits it
    first_hop: bool = True  # of symmetric collectives
    last_hop: bool = True  # of symmetric collectives and single copy
    results_apart: bool = True  # two-shot: results go into the slot of step a+1, not of a


PRESENT = Protocol()


@dataclass(frozen=True)
class Call:
    """One collective call. `root` counts from the end if negative."""

    kind: str
    chunks: int = 1
    in_place: bool = True
    root: int = 0

    def __str__(self) -> str:
        details = [f"{self.chunks} chunks"] if self.chunks != 1 else []
        details += [] if self.in_place or self.kind == "barrier" else ["out of place"]
        details += [f"root {self.root}"] if self.root else []
        return f"{self.kind} ({', '.join(details)})" if details else self.kind


class Memory:
    """Names places of a program's memory."""

    def __init__(self, world: int, chunks: int, protocol: Protocol) -> None:
        self.world, self.chunks, self.ring = world, chunks, protocol.ring
        self.locations: list[Location] = []
        self.index: dict[tuple[object, ...], int] = {}
        for rank in range(world):
            for k in range(self.ring):
                self.add("slot", rank, k, *range(world))
                for word in ("descriptor", "address"):
                    self.index[word, rank, k] = len(self.locations)
                    self.locations.append(Location(f"{word}[{rank}][{k}]", word=True))
            for chunk in range(chunks):
                self.add("x", rank, chunk, *range(world), initial=given(0, rank))
                self.add("y", rank, chunk, *range(world))

    def add(self, name: str, rank: int, row: int, *pieces: int, initial: str = "") -> None:
        for piece in pieces:
            self.index[name, rank, row, piece] = len(self.locations)
            self.locations.append(Location(f"{name}[{rank}][{row}][{piece}]", initial))


def given(call: int, rank: int) -> str:
    """The input of `rank` for a call."""
    return f"input of rank {rank} for call {call}"


def sent(call: int, rank: int, chunk: int) -> str:
    """What a slot holds that `rank` has filled with chunk `chunk` of its input."""
    return f"chunk {chunk} of rank {rank} for call {call}"


def result(call: int, part: int | str = "all") -> str:
    return f"result {part} of call {call}"


class Rank:
    """Writes the program of one rank."""

    def __init__(self, rank: int, memory: Memory, protocol: Protocol, careful: bool) -> None:
        self.rank, self.memory, self.protocol, self.careful = rank, memory, protocol, careful
        self.world = memory.world
        self.peers = [r for r in range(self.world) if r != rank]
        self.operations: list[Operation] = []
        self.next_step = 1
        self.call = 0

    # --- comm.h ---

    def publish(self, step: int) -> None:
        line = step % self.protocol.ring
        words = tuple((self.memory.index[word, self.rank, line], f"{step}") for word in ("descriptor", "address"))
        both: list[Operation] = [
            Data("stores the words", self.call, writes=words),
            Store(self.rank * self.protocol.ring + line, step, release=self.protocol.release),
        ]
        self.operations += both if self.protocol.words_first else reversed(both)

    def wait(self, step: int) -> None:
        """await(): the peers in order of rank, the flag and then the words of each."""
        left = (self.rank - 1) % self.world
        for peer in self.peers if self.protocol.await_all else [left]:
            line, acquire = peer * self.protocol.ring + step % self.protocol.ring, self.protocol.acquire
            if self.careful:
                again = acquire and self.protocol.acquire_again
                self.operations += [
                    Load(line, step, acquire=acquire, equal=3, other=1),
                    Load(line, step, acquire=False),  # bounded_wait
                    Load(line, step, acquire=again, other=1),  # whatever it finds
                ]
            else:
                self.operations.append(Load(line, step, acquire=acquire))
            if self.protocol.compare:
                self.word("compares", "descriptor", peer, step)

    def hop(self) -> None:
        self.publish(self.next_step)
        self.wait(self.next_step)
        self.next_step += 1

    def word(self, what: str, name: str, peer: int, step: int) -> None:
        self.operations.append(
            Data(what, self.call, reads=((self.memory.index[name, peer, step % self.protocol.ring], f"{step}"),))
        )

    # --- plain accesses ---

    def slot(self, rank: int, step: int, pieces: Iterable[int]) -> list[int]:
        return [self.memory.index["slot", rank, step % self.protocol.ring, piece] for piece in pieces]

    def buffer(self, name: str, rank: int, chunks: Iterable[int], pieces: Iterable[int]) -> list[int]:
        pieces = list(pieces)
        return [self.memory.index[name, rank, chunk, piece] for chunk in chunks for piece in pieces]

    def do(self, what: str, reads: Iterable[tuple[list[int], str]], writes: Iterable[tuple[list[int], str]]) -> None:
        self.operations.append(
            Data(
                what,
                self.call,
                reads=tuple((where, value) for places, value in reads for where in places),
                writes=tuple((where, value) for places, value in writes for where in places),
            )
        )

    # --- pipeline.h ---

    def pipelined(
        self, chunks: int, fill: Callable[[int, int], None], drain: Callable[[int, int], None], awaits: bool = True
    ) -> None:
        if chunks == 0:
            self.hop()
            return
        first, ahead = self.next_step, self.protocol.ahead
        for i in range(min(ahead, chunks)):
            fill(i, first + i)
            self.publish(first + i)
        for i in range(chunks):
            if i + ahead < chunks:
                fill(i + ahead, first + i + ahead)
                self.publish(first + i + ahead)
            if not self.protocol.wait_first:
                drain(i, first + i)
            if awaits:
                self.wait(first + i)
            if self.protocol.wait_first:
                drain(i, first + i)
        self.next_step = first + chunks
