# SPDX-License-Identifier: Apache-2.0
"""An explorer for the protocols of csrc/cuda, under weak memory with several writers of a place. Plain Python.

protocol_model.py is for one writer of a line and for the value of a step; here a slot is filled by one rank and emptied by
another, flags are waited for with "at least", and much is relaxed. So this is a machine of views (RC11 without load buffering):

    Places      Every place, slot, mail or flag, is a history of messages. A message has a value and what its reader may learn.
    Views       Each agent knows a message of each place and reads that one or *any* later one. A relaxed load learns for the next
                fence only, an acquire load at once; a release store tells all that its agent knows, a relaxed one what it knew at
                its last fence.
    Agents      The threads of a rank between which nothing but the kernel's end makes an order: those that move data are one,
                those that talk about the call another. Threads that meet are one agent.
    Ends        of a kernel are where all agents of a rank meet, and a fence of both kinds for the whole system. This is assumed
                of CUDA: the writes of a kernel are visible to what comes after it in its stream, and so is what those depend on.

What is looked for (`Found.kind`)
    value       data or mail of another call, rank or tile, or a slot that is empty where something has to be
    order       a write to a place whose last write the writer does not know: which of the two stays is anybody's guess
    deadlock    agents wait, and no message will end it

Stores and ends are taken at once when they come up: others may still read what was there before, so no outcome is lost. What
can be read is all that differs between runs, and every choice of it is explored. Not modelled: deadlines and faults, two kernels
at once, and the arithmetic of sizes; csrc/tests/test_gpu_*.cc run the kernels themselves for those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

View = tuple[int, ...]  # of each place: a message
EMPTY = "empty"


@dataclass(frozen=True)
class Write:
    """A store. `what` is said in counterexamples."""

    what: str
    place: int
    value: str | int
    release: bool = False


@dataclass(frozen=True)
class Read:
    """A load that has to find `value`. If it waits, it looks again while it finds EMPTY, or with `least` a smaller number."""

    what: str
    place: int
    value: str | int
    waits: bool = False
    least: bool = False
    acquire: bool = False


@dataclass(frozen=True)
class End:
    """The end of a kernel: all agents of `rank` meet."""

    rank: int
    fence: bool = True


Step = Write | Read | End


@dataclass(frozen=True)
class Program:
    """What each agent does; of which rank it is; what lies at each place at first, and its name."""

    agents: Sequence[Sequence[Step]]
    ranks: Sequence[int]
    places: Sequence[tuple[str, str | int]]


@dataclass
class Found:
    """Of an exploration: states, in how many all are through, and the first run that went wrong with its kind."""

    states: int = 0
    ends: int = 0
    kind: str = ""
    text: str = ""
    trace: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n    ".join([f"{self.kind}: {self.text}", *self.trace]) if self.kind else f"{self.states} states"


class Message(NamedTuple):
    """A value, and what an agent that reads it may learn."""

    value: str | int
    view: View


class Agent(NamedTuple):
    """Steps done; what it knows; what it will know after a fence; what its relaxed stores tell."""

    done: int
    knows: View
    later: View
    tells: View


State = tuple[tuple[Agent, ...], tuple[tuple[Message, ...], ...]]


class _Wrong(Exception):
    """Kind and text."""


def explore(program: Program) -> Found:
    """Visits every state that differs in what was read; ends with the first wrong one."""
    nothing = (0,) * len(program.places)
    start = Agent(0, nothing, nothing, nothing)
    first: State = ((start,) * len(program.agents), tuple((Message(value, nothing),) for _, value in program.places))
    found = Found()
    before: dict[State, tuple[State, str] | None] = {}

    def wrong(problem: _Wrong, at: State | None, last: str) -> Found:
        found.kind, found.text = problem.args
        found.trace = [last] if last else []
        while at is not None and (link := before[at]) is not None:
            at, said = link
            found.trace.append(said)
        found.trace.reverse()
        return found

    try:
        first = _settle(program, first)
    except _Wrong as problem:
        return wrong(problem, None, "")
    before[first] = None
    todo = [first]
    while todo:
        state = todo.pop()
        found.states += 1
        stuck = True
        for index, agent in enumerate(state[0]):
            if agent.done == len(program.agents[index]):
                continue
            step = program.agents[index][agent.done]
            if not isinstance(step, Read):
                continue
            for number in range(agent.knows[step.place], len(state[1][step.place])):
                said = f"rank {program.ranks[index]} {step.what}: {state[1][step.place][number].value}"
                try:
                    after = _read(program, state, index, step, number)
                    if after is None:
                        continue
                    after = _settle(program, after)
                except _Wrong as problem:
                    return wrong(problem, state, said)
                stuck = False
                if after not in before:
                    before[after] = (state, said)
                    todo.append(after)
        if stuck:
            if any(agent.done < len(steps) for agent, steps in zip(state[0], program.agents, strict=True)):
                return wrong(_Wrong("deadlock", "nobody can go on"), state, "")
            found.ends += 1
    return found


def _joined(a: View, b: View) -> View:
    return a if a == b else tuple(map(max, a, b))


def _put(view: View, place: int, number: int) -> View:
    return (*view[:place], number, *view[place + 1 :])


def _read(program: Program, state: State, index: int, step: Read, number: int) -> State | None:
    """The state after this agent has read that message; None if it looks again."""
    agents, memory = state
    agent, (value, view) = agents[index], memory[step.place][number]
    if step.least:
        assert isinstance(value, int)
        assert isinstance(step.value, int)
        if value < step.value:
            return None
    elif step.waits and value == EMPTY:
        return None
    elif value != step.value:
        name = program.places[step.place][0]
        raise _Wrong("value", f"rank {program.ranks[index]} {step.what}: found {value!r} in {name}, wanted {step.value!r}")
    knows = _put(agent.knows, step.place, number)
    if step.acquire:
        knows = _joined(knows, view)
    later = _joined(_joined(agent.later, view), knows)
    after = Agent(agent.done + 1, knows, later, agent.tells)
    return (*agents[:index], after, *agents[index + 1 :]), memory


def _settle(program: Program, state: State) -> State:
    """Does all stores and ends that come up. Raises `_Wrong`."""
    agents, memory = list(state[0]), list(state[1])
    goes_on = True
    while goes_on:
        goes_on = False
        for index, steps in enumerate(program.agents):
            while agents[index].done < len(steps) and isinstance(step := steps[agents[index].done], Write):
                agents[index] = _write(program, agents[index], program.ranks[index], memory, step)
                goes_on = True
        for rank in set(program.ranks):
            own = [i for i, r in enumerate(program.ranks) if r == rank]
            places = [agents[i].done for i in own]
            if all(
                done < len(program.agents[i]) and isinstance(program.agents[i][done], End)
                for i, done in zip(own, places, strict=True)
            ):
                end = program.agents[own[0]][places[0]]
                assert isinstance(end, End)
                knows = agents[own[0]].knows
                later = agents[own[0]].later
                for i in own[1:]:
                    knows, later = _joined(knows, agents[i].knows), _joined(later, agents[i].later)
                for i in own:
                    told = later if end.fence else agents[i].tells
                    agents[i] = Agent(agents[i].done + 1, later if end.fence else knows, later, told)
                goes_on = True
    return tuple(agents), tuple(memory)


def _write(program: Program, agent: Agent, rank: int, memory: list[tuple[Message, ...]], step: Write) -> Agent:
    number = len(memory[step.place])
    if agent.knows[step.place] != number - 1:
        name, last = program.places[step.place][0], memory[step.place][-1].value
        raise _Wrong("order", f"rank {rank} {step.what}: {name} may still get {last!r}, which this rank does not know of")
    knows = _put(agent.knows, step.place, number)
    view = knows if step.release else _put(agent.tells, step.place, number)
    memory[step.place] = (*memory[step.place], Message(step.value, view))
    return Agent(agent.done + 1, knows, _joined(agent.later, knows), agent.tells)
