# SPDX-License-Identifier: Apache-2.0
"""An explicit-state explorer for the flag protocol of csrc/cpu/comm.h, under C++'s memory model. Plain Python.

Ranks run programs made of `Data`, `Store` and `Load`; `explore` runs all interleavings. protocol_ranks.py has publish(), await()
and the pipeline, protocol_programs.py the collectives, each with the C++ file that it mirrors, and protocol_search.py what is
explored.

Memory
    Flags       A flag line is a history of messages: value, where the writer stood, and what the writer knew if the store was a
                release. A load returns *any* message that coherence and happens-before leave: none older than the last one that
                this rank has read there, none older than the newest one that happens before the load. So stale reads are
                explored; nothing is sequentially consistent. An acquire load learns what the writer knew, a relaxed one does not.
    Data        (staging slots, the users' buffers) are plain memory. Each location keeps its last write and each rank's last
                read since. Two accesses, one of them a write, that happens-before does not order are a data race.
    Words       (descriptor, address) are relaxed atomics. A read is right only if it can return nothing but the word of its
                step: the last write happens before it, and it happens before the next write. The check is that of data.
    Values      say who wrote them, for which call and chunk or which step. A read says what it has to find.

What is looked for (`Violation.kind`)
    race        two plain accesses that nothing orders
    caller      the same, where one of them is what the user does with its buffers after its call has returned
    value       data of another rank, call or step
    word        a descriptor or an address of another step can be read
    lost flag   a rank waits for a step in a line that holds a later one: stores become visible in finite time, so it may never
                see its step
    deadlock    ranks wait, and no message that they can read will end it

Why this is complete for this class of programs
    1. Every flag line and every word has one writer, so its modification order is that rank's program order: a history in order
       of execution holds all there is. (`Program` refuses a second writer and values that do not grow.)
    2. A rank gets past a wait only by reading the value of its step, and one store writes that value. So which store each
       decisive load reads from is the same in all executions, hence happens-before is: program order and these edges. Loads that
       find something else are explored all the same, those of the fast path and those of the spin.
    3. Interleavings reach every execution in which program order and reads-from have no cycle. C++ allows such cycles among
       relaxed accesses, but here there can be none: a flag that is acted on was read by an acquire load from a release store,
       so these edges are happens-before, which has no cycles; and a read of a word or of data is accepted only if it is ordered
       against *every* write there, earlier or later, so it cannot return what has not been written yet either.
    4. Of two accesses that nothing orders, the second one in any run finds the first. When plain accesses run between two flag
       operations of their rank changes nothing else, so `merge` runs them right after the flag operation before them; a test
       compares that with every operation on its own.
    5. Positions in programs only grow, and so does what a rank has read of a line: no state comes again in a run, so every run
       ends unless it is stuck.

Not modelled: deadlines, abort words and all that follows a failed wait (faults.cc), the hello lines, two threads in one
communicator (`busy` refuses the second), ranks that make different calls, and the arithmetic of sizes and offsets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Places = tuple[int, ...]  # a number a rank, or a line: operations done, or messages


@dataclass(frozen=True)
class Location:
    """A piece of memory that is accessed as a whole."""

    name: str
    initial: str = ""
    word: bool = False


@dataclass(frozen=True)
class Data:
    """Plain reads, each with what it has to find, then plain writes, in the course of call number `call`."""

    what: str
    call: int
    reads: tuple[tuple[int, str], ...] = ()
    writes: tuple[tuple[int, str], ...] = ()
    by_caller: bool = False


@dataclass(frozen=True)
class Store:
    """A store to a flag line of the rank's own."""

    line: int
    value: int
    release: bool = True


@dataclass(frozen=True)
class Load:
    """A load of a flag line: goes `equal` operations on if it finds `value`, else `other`; 0 is to stay and load again."""

    line: int
    value: int
    acquire: bool = True
    equal: int = 1
    other: int = 0


Operation = Data | Store | Load


@dataclass(frozen=True)
class Program:
    """What every rank does, and the memory it does it in. `owners[line]` is the one rank that may store to a line."""

    name: str
    ranks: Sequence[Sequence[Operation]]
    locations: Sequence[Location]
    owners: Sequence[int]

    def __post_init__(self) -> None:
        words: dict[int, int] = {}
        for rank, operations in enumerate(self.ranks):
            newest = dict.fromkeys(range(len(self.owners)), 0)
            for place, operation in enumerate(operations):
                if isinstance(operation, Store):
                    if self.owners[operation.line] != rank or operation.value <= newest[operation.line]:
                        raise ValueError(f"rank {rank} may not store {operation.value} to line {operation.line}")
                    newest[operation.line] = operation.value
                elif isinstance(operation, Load):
                    if operation.equal < 1 or operation.other < 0:
                        raise ValueError(f"rank {rank} jumps back at operation {place}")
                else:
                    for where, _ in operation.writes:
                        if self.locations[where].word and words.setdefault(where, rank) != rank:
                            raise ValueError(f"rank {rank} may not write {self.locations[where].name}")


@dataclass(frozen=True)
class Violation:
    """What went wrong, and the run that led to it: a line an operation."""

    kind: str
    text: str
    trace: tuple[str, ...]

    def __str__(self) -> str:
        return "\n    ".join([f"{self.kind}: {self.text}", *self.trace])


@dataclass
class Result:
    """Of an exploration: states visited, in how many of them all ranks are through, a shortest run of each kind of violation.

    `places` counts the combinations of positions in the programs. It equals `states` as long as where the ranks are says all
    about a state: point 2 of the module's docstring.
    """

    states: int = 0
    places: int = 0
    transitions: int = 0
    ends: int = 0
    violations: dict[str, Violation] = field(default_factory=dict)


class Broken(Exception):
    """An operation violates something. Arguments: kind and text."""


# value, its writer (-1: nobody), the writer's place after it, the place of each rank after its last read since
Cell = tuple[str, int, int, Places]
# value, the writer's place after it, what the writer knew (None: a relaxed store)
Message = tuple[int, int, Places | None]


class State(NamedTuple):
    """Where everybody is, and all that can make a difference from here on."""

    places: Places  # operations done, a rank
    known: tuple[Places, ...]  # of each rank: the operations of each rank that happen before its next one
    read: tuple[Places, ...]  # of each rank: the message of each line that it read last
    lines: tuple[tuple[Message, ...], ...]
    memory: tuple[Cell, ...]


class Node(NamedTuple):
    """A state, and the shortest way to it: the state before, and which rank moved."""

    state: State
    before: Node | None = None
    mover: int = 0


def explore(program: Program, *, merge: bool = True, everything: bool = False) -> Result:
    """Visits every state that the ranks can reach together, nearest first.

    Args:
        program: what they run.
        merge: run plain accesses together with the flag operation before them.
        everything: go on after the first violation, to find the other kinds; a run ends at its own first one in any case.
    """
    machine = Machine(program, merge)
    result = Result()
    seen: dict[Places, list[State]] = {}
    todo: deque[Node] = deque()

    def broken(problem: Broken, node: Node | None) -> None:
        kind, text = problem.args
        if kind not in result.violations:
            trace = []
            while node is not None and node.before is not None:
                trace.append(machine.describe(node.before.state, node.mover))
                node = node.before
            result.violations[kind] = Violation(kind, f"{program.name}: {text}", tuple(reversed(trace)))

    try:
        todo.append(Node(machine.start()))
    except Broken as problem:
        broken(problem, None)
    while todo and (everything or not result.violations):
        node = todo.popleft()
        state = node.state
        result.states += 1
        stuck = True
        for rank, message in machine.choices(state):
            try:
                after = machine.step(state, rank, message)
            except Broken as problem:
                stuck = False
                broken(problem, Node(state, node, rank))
                continue
            if after == state:
                continue  # it looked, saw nothing new, and looks again
            stuck = False
            result.transitions += 1
            known = seen.setdefault(after.places, [])
            if after not in known:
                known.append(after)
                todo.append(Node(after, node, rank))
        if stuck and machine.ended(state):
            result.ends += 1
        elif stuck:
            waits = "; ".join(machine.describe(state, r) for r in range(machine.world) if not machine.through(state, r))
            broken(Broken("deadlock", f"nobody can go on: {waits}"), node)
    result.places = len(seen) + 1  # nobody comes back to the start
    return result


class Machine:
    """Executes operations of a program."""

    def __init__(self, program: Program, merge: bool) -> None:
        self.program = program
        self.ranks = [tuple(operations) for operations in program.ranks]
        self.world = len(self.ranks)
        self.owners = tuple(program.owners)
        self.nothing = (0,) * self.world
        # The plain accesses that follow at each place: run together with what precedes them, if merged.
        self.plain = [
            [self.batch(operations, place) if merge else () for place in range(len(operations) + 1)] for operations in self.ranks
        ]

    @staticmethod
    def batch(operations: Sequence[Operation], place: int) -> tuple[Data, ...]:
        return tuple(takewhile(lambda operation: isinstance(operation, Data), operations[place:]))  # type: ignore[arg-type]

    def start(self) -> State:
        """The state in which nobody has touched a flag. Raises `Broken`."""
        lines = (((0, 0, self.nothing),),) * len(self.owners)
        memory = tuple((location.initial, -1, 0, self.nothing) for location in self.program.locations)
        state = State(self.nothing, (self.nothing,) * self.world, ((0,) * len(self.owners),) * self.world, lines, memory)
        for rank in range(self.world):
            state = self.access(state, rank, self.plain[rank][0])
        return state

    def through(self, state: State, rank: int) -> bool:
        return state.places[rank] == len(self.ranks[rank])

    def ended(self, state: State) -> bool:
        return all(self.through(state, rank) for rank in range(self.world))

    def choices(self, state: State) -> list[tuple[int, int]]:
        """What can happen next: a rank, and for a load the message that it returns."""
        found = []
        for rank, operations in enumerate(self.ranks):
            place = state.places[rank]
            if place == len(operations):
                continue
            operation = operations[place]
            if isinstance(operation, Load):
                line = state.lines[operation.line]
                before = state.known[rank][self.owners[operation.line]]
                oldest = state.read[rank][operation.line]
                newest = len(line) - 1
                found.append((rank, newest))
                while newest > oldest and line[newest][1] > before:
                    newest -= 1
                    found.append((rank, newest))
            else:
                found.append((rank, 0))
        return found

    def step(self, state: State, rank: int, message: int) -> State:
        """One choice, and merged with it the plain accesses that follow. Raises `Broken`."""
        operation = self.ranks[rank][state.places[rank]]
        if isinstance(operation, Load):
            state = self.load(state, rank, operation, message)
        elif isinstance(operation, Store):
            state = self.store(state, rank, operation)
        else:
            return self.access(state, rank, (operation,))
        return self.access(state, rank, self.plain[rank][state.places[rank]])

    def store(self, state: State, rank: int, store: Store) -> State:
        place = state.places[rank] + 1
        message = (store.value, place, put(state.known[rank], rank, place) if store.release else None)
        lines = put(state.lines, store.line, (*state.lines[store.line], message))
        return State(put(state.places, rank, place), state.known, state.read, lines, state.memory)

    def load(self, state: State, rank: int, load: Load, message: int) -> State:
        line = state.lines[load.line]
        if line[-1][0] > load.value:
            raise Broken("lost flag", f"rank {rank} looks for step {load.value} where {line[-1][0]} stands")
        value, _, told = line[message]
        known, read = state.known, state.read
        if load.acquire and told is not None:
            known = put(known, rank, tuple(map(max, known[rank], told)))
        if read[rank][load.line] != message:
            read = put(read, rank, put(read[rank], load.line, message))
        place = state.places[rank] + (load.equal if value == load.value else load.other)
        return State(put(state.places, rank, place), known, read, state.lines, state.memory)

    def access(self, state: State, rank: int, batch: Sequence[Data]) -> State:
        if not batch:
            return state
        place, known = state.places[rank], state.known[rank]
        memory = list(state.memory)
        for data in batch:
            place += 1
            for where, wanted in data.reads:
                value, writer, written, reads = memory[where]
                if writer >= 0 and writer != rank and known[writer] < written:
                    raise self.race(rank, data, where, "write", writer, written)
                if value != wanted:
                    location = self.program.locations[where]
                    kind = "word" if location.word else "value"
                    raise Broken(kind, f"rank {rank} ({data.what}) finds {value!r} in {location.name}, wanted {wanted!r}")
                memory[where] = (value, writer, written, put(reads, rank, place))
            for where, value in data.writes:
                _, writer, written, reads = memory[where]
                if writer >= 0 and writer != rank and known[writer] < written:
                    raise self.race(rank, data, where, "write", writer, written)
                if reads is not self.nothing:
                    for reader, last in enumerate(reads):
                        if last > known[reader] and reader != rank:
                            raise self.race(rank, data, where, "read", reader, last)
                memory[where] = (value, rank, place, self.nothing)
        return State(put(state.places, rank, place), state.known, state.read, state.lines, tuple(memory))

    def race(self, rank: int, data: Data, where: int, how: str, other: int, place: int) -> Broken:
        location, before = self.program.locations[where], self.ranks[other][place - 1]
        assert isinstance(before, Data)
        late = (data.by_caller and before.call <= data.call) or (before.by_caller and data.call <= before.call)
        kind = "word" if location.word else "caller" if late else "race"
        text = f"nothing orders the {how} of {location.name} by rank {other} ({before.what}, call {before.call}) before"
        return Broken(kind, f"{text} that of rank {rank} ({data.what}, call {data.call})")

    def describe(self, state: State, rank: int) -> str:
        """What `rank` does next."""
        operation = self.ranks[rank][state.places[rank]]
        if isinstance(operation, Data):
            return f"rank {rank}: {operation.what}"
        if isinstance(operation, Store):
            return f"rank {rank}: publishes {operation.value}" + ("" if operation.release else ", relaxed")
        order = "acquire" if operation.acquire else "relaxed"
        return f"rank {rank}: looks for {operation.value} of rank {self.owners[operation.line]}, {order}"


def put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    """`values` with another value at `index`."""
    return (*values[:index], value, *values[index + 1 :])
