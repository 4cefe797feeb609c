# SPDX-License-Identifier: Apache-2.0
"""Which programs are explored, and the long search: `python protocol_search.py`, or `nox -s model`.

CATALOGUE has every collective in every form, staged ones with 0 or 1, 2, 3, 5 and 6 chunks: 1 opens one step at a time, 2 and 3
begin and end a pipeline, from 5 on the ring of four comes round inside a call. FEW has one or two forms of each collective, for
longer sequences. In sequences calls meet at other places of the ring, and with what the call before left open.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

from protocol_model import Result, explore
from protocol_programs import program
from protocol_ranks import PRESENT, Call, Protocol

CATALOGUE = (
    Call("barrier"),
    *(
        Call(kind, chunks, in_place)
        for kind, counts in (
            ("all_reduce_one_shot", (0, 1, 2, 3, 5, 6)),
            ("all_reduce_two_shot", (0, 1, 2, 3, 5)),
            ("all_reduce_symmetric", (1,)),
            ("all_reduce_single_copy", (1,)),
            ("all_gather", (0, 1, 2, 3, 5)),
            ("all_gather_symmetric", (1,)),
            ("reduce_scatter", (0, 1, 2, 3, 5)),
            ("reduce_scatter_symmetric", (1,)),
        )
        for chunks in counts
        for in_place in (True, False)
    ),
    *(Call("broadcast", chunks, root=root) for chunks in (0, 1, 2, 3, 5) for root in (0, -1)),
    *(Call("broadcast_symmetric", root=root) for root in (0, -1)),
)

FEW = (
    Call("barrier"),
    Call("all_reduce_one_shot", 1),
    Call("all_reduce_one_shot", 3, in_place=False),
    Call("all_reduce_two_shot", 1, in_place=False),
    Call("all_reduce_two_shot", 2),
    Call("all_reduce_symmetric"),
    Call("all_reduce_symmetric", in_place=False),
    Call("all_reduce_single_copy"),
    Call("all_reduce_single_copy", in_place=False),
    Call("all_gather", 2, in_place=False),
    Call("all_gather_symmetric"),
    Call("reduce_scatter", 2),
    Call("reduce_scatter_symmetric", in_place=False),
    Call("broadcast", 2),
    Call("broadcast_symmetric", root=-1),
)


def alone(calls: Sequence[Call]) -> list[tuple[Call, ...]]:
    return [(call,) for call in calls]


def sequences(calls: Sequence[Call], length: int) -> list[tuple[Call, ...]]:
    """Every ordered choice of `length` calls, the same one again included."""
    return list(itertools.product(calls, repeat=length))


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """An exploration makes many tuples and no cycles: looking for garbage takes half of its time."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def search(
    world: int, programs: Iterable[Sequence[Call]], protocol: Protocol = PRESENT, *, careful: bool = True, merge: bool = True
) -> Result:
    """Explores programs one after the other, up to the first that has a violation: the sum of their results."""
    total = Result()
    with without_gc():
        for calls in programs:
            found = explore(program(world, calls, protocol, careful=careful), merge=merge)
            total.states += found.states
            total.places += found.places
            total.transitions += found.transitions
            total.ends += found.ends
            total.violations |= found.violations
            if found.violations:
                break
    return total


def main() -> int:
    """The searches that take minutes. Prints what was explored, and the run that leads to a violation."""
    searches = (
        ("2 ranks, every triple", 2, sequences(FEW, 3), True, True),
        ("3 ranks, each alone, every plain access on its own", 3, alone(CATALOGUE), False, False),
        ("3 ranks, every pair of FEW", 3, sequences(FEW, 2), True, True),
        ("3 ranks, every pair of CATALOGUE, one load a wait", 3, sequences(CATALOGUE, 2), False, True),
        ("3 ranks, every triple of FEW, one load a wait", 3, sequences(FEW, 3), False, True),
    )
    for name, world, programs, careful, merge in searches:
        begun = time.monotonic()
        result = search(world, programs, careful=careful, merge=merge)
        for violation in result.violations.values():
            print(violation)
            return 1
        if result.ends != len(programs):
            print(f"{name}: {result.ends} ends of {len(programs)} programs")
            return 1
        print(
            f"{name}: {len(programs)} programs, {result.states} states, no violation, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
