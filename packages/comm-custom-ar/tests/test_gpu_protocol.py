# SPDX-License-Identifier: Apache-2.0
"""The protocols of csrc/cuda, explored for 2 and 3 ranks; gpu_protocol_model.py says what that means and what is assumed of CUDA.

Longer sequences: `python gpu_protocol_programs.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gpu_protocol_model import EMPTY, End, Program, Read, Write, explore
from gpu_protocol_programs import KINDS, PRESENT, Call, Protocol, search, sequences

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
ONE = [call for call in KINDS if call.count == 1]

pytestmark = pytest.mark.timeout(300)

# --- the explorer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("release", "acquire", "kind"), [(True, True, ""), (False, True, "value"), (True, False, "value")])
def test_what_a_flag_is_raised_for_is_there_only_with_release_and_acquire(release, acquire, kind):
    writer = [Write("writes", 0, "new"), Write("raises", 1, 1, release=release)]
    reader = [Read("waits", 1, 1, waits=True, least=True, acquire=acquire), Read("reads", 0, "new")]
    assert explore(Program([writer, reader], [0, 1], [("data", EMPTY), ("flag", 0)])).kind == kind


@pytest.mark.parametrize(("fence", "kind"), [(True, ""), (False, "order")])
def test_the_end_of_a_kernel_orders_what_relaxed_stores_tell(fence, kind):
    """The owner empties a slot, ends a kernel, and says so; the other hears it, ends a kernel, and fills the slot."""
    owner = [Write("empties", 0, EMPTY), End(0, fence), Write("says", 1, "it")]
    other = [Read("hears", 1, "it", waits=True), End(1, fence), Write("fills", 0, "new")]
    found = explore(Program([owner, other], [0, 1], [("slot", "old"), ("mail", EMPTY)]))
    assert found.kind == kind
    assert bool(found.trace) == bool(kind)


def test_a_rank_may_read_what_is_overwritten_until_it_knows_better():
    writer = [Write("writes", 0, "new")]
    assert explore(Program([writer, [Read("reads", 0, "new")]], [0, 1], [("data", "old")])).kind == "value"
    assert explore(Program([writer, [Read("reads", 0, "old")]], [0, 1], [("data", "old")])).kind == "value"


def test_two_writers_that_do_not_know_of_each_other_are_found():
    assert explore(Program([[Write("a", 0, "a")], [Write("b", 0, "b")]], [0, 1], [("place", EMPTY)])).kind == "order"


def test_who_waits_for_what_nobody_sends_is_a_deadlock():
    waits = [Read("waits", 0, "it", waits=True)]
    assert explore(Program([waits, []], [0, 1], [("place", EMPTY)])).kind == "deadlock"
    least = [Read("waits", 0, 2, waits=True, least=True)]
    assert explore(Program([[Write("raises", 0, 1)], least], [0, 1], [("flag", 0)])).kind == "deadlock"


# --- the model and the code ---------------------------------------------------------------------------------------------

# What the kernels do, in the order of the file; gpu_protocol_programs.py mirrors it.
STRUCTURE = {
    "one_shot_push.h": "begin control store_shared send heard send load_shared has_empty wait_on load_shared store store_some",
    "two_shot_push.h": "begin control has_empty wait_on load_shared store store_shared load_shared take store_shared store_some"
    " load_shared store_some take send heard send add gather gather",
    "moves.h": "begin exchange_tiles store_shared store_some store_some load_shared leave"
    " begin exchange_tiles store_shared load_shared store_some leave"
    " begin exchange_tiles store_shared store_some load_shared leave"
    " begin enter agree leave",
}
TILES = {
    "exchange_tiles": "enter send sync raise await take agree",
}


def _code(name: str) -> str:
    return re.sub(r"//[^\n]*", "", (SOURCES / name).read_text())


@pytest.mark.parametrize("name", STRUCTURE)
def test_the_kernels_have_the_structure_that_the_model_mirrors(name):
    session = "begin|control|enter|agree|leave|exchange_tiles|send|add|gather|take|heard|has_empty|wait_on"
    words = f"{session}|load_shared|store_shared|store|store_some"
    found = " ".join(re.findall(rf"\b({words})(?:<\w+>)?\(", _code(name)))
    assert found == STRUCTURE[name], f"{name} has changed: make gpu_protocol_programs.py do the same, then this line"


@pytest.mark.parametrize("name", TILES)
def test_tiles_are_exchanged_as_the_model_does_it(name):
    body = _code("tiles.h").split(f"void {name}(")[1].split("\n}\n")[0]
    assert " ".join(re.findall(r"\b(enter|send|sync|raise|await|take|agree)\(", body)) == TILES[name]


def test_the_ring_the_parities_and_the_orders_of_memory_are_those_of_the_code():
    assert f"kRing = {PRESENT.ring};" in _code("layout.h")
    session = _code("session.h")
    assert session.count("calls & 1") == PRESENT.parities == PRESENT.mail_parities == 2  # of slots, and of mail
    tiles = _code("tiles.h")
    assert "store_release(s.flag(" in tiles
    assert "load_acquire(at) - value" in tiles
    assert "pull" in {call.kind for call in KINDS}
    assert len(re.findall(r"raise\(s, s\.tiles \+ [12]\)", _code("all_reduce_pull.h"))) == 4


# --- the proof ----------------------------------------------------------------------------------------------------------


def _right(found, programs, least):
    assert not found.kind, str(found)
    assert found.ends == len(programs)
    assert found.states >= least


def test_two_ranks_do_every_pair_of_calls_right():
    programs = sequences(KINDS, 2)
    _right(search(2, programs), programs, 10_000)


@pytest.mark.parametrize("first", ONE, ids=str)
def test_two_ranks_do_every_triple_of_calls_right(first):
    programs = [(first, *rest) for rest in sequences(ONE, 2)]
    _right(search(2, programs), programs, 1_000)


@pytest.mark.parametrize("call", KINDS, ids=str)
def test_three_ranks_do_every_call_right(call):
    _right(search(3, [(call,)]), [(call,)], 20)


@pytest.mark.parametrize("kind", ["push", "push_twice", "barrier"])
def test_two_ranks_go_round_the_slots_often(kind):
    programs = [tuple(Call(kind, 1 + (i >> n & 1)) for n in range(5)) for i in range(32)]
    _right(search(2, programs), programs, 100)


@pytest.mark.parametrize("calls", [[Call("tiles", 5)], [Call("broadcast", 6)], [Call("tiles", 3), Call("tiles", 2)]], ids=str)
def test_two_ranks_go_round_the_ring_in_one_call_and_over_two(calls):
    _right(search(2, [calls]), [calls], 500)


def test_three_ranks_that_push_in_a_row_keep_the_calls_apart():
    programs = [(Call("push"),) * 2, (Call("push"), Call("barrier")), (Call("barrier"),) * 4]
    programs += [(Call("push_twice"), Call("push")), (Call("push"), Call("push_twice"))]
    _right(search(3, programs), programs, 500)


# --- mistakes -----------------------------------------------------------------------------------------------------------

PUSH, TWICE, TILES_1 = Call("push"), Call("push_twice"), Call("tiles")
FLAGGED = [[TILES_1], [Call("broadcast")], [Call("pull")], [Call("pull_twice")]]

MISTAKES = {
    "one parity of slots": (Protocol(parities=1), [[PUSH] * 2, [TWICE] * 2, [PUSH, TWICE]]),
    "sums where parts are": (Protocol(sums_at=0), [[TWICE]]),
    "sums where a later part is": (Protocol(sums_at=1), [[Call("push_twice", 2)]]),
    "one parity of mail": (Protocol(mail_parities=1), [[Call("barrier")] * 2, [PUSH] * 2, [TILES_1] * 2]),
    "slots are not emptied": (Protocol(empties=False), [[PUSH] * 3, [TWICE] * 3]),
    "slots are emptied after the next call was said": (Protocol(empties_in_time=False), [[PUSH] * 3, [TWICE] * 3]),
    "nobody waits for what peers call": (Protocol(hears=False), [[PUSH, Call("barrier"), PUSH], [TWICE, Call("barrier"), TWICE]]),
    "no fence at the end of a kernel": (Protocol(fence=False), [[PUSH] * 3, [Call("barrier")] * 3]),
    "a relaxed flag": (Protocol(release=False), FLAGGED),
    "a flag is looked at with a relaxed load": (Protocol(acquire=False), FLAGGED),
    "a ring of three": (Protocol(ring=3), [[Call("tiles", 4)], [Call("tiles", 2)] * 2, [Call("broadcast", 4)]]),
    "a ring of two": (Protocol(ring=2), [[Call("tiles", 3)], [Call("tiles", 2)] * 2]),
    "a flag is raised before the tile two back is read": (Protocol(reads_first=False), [[Call("tiles", 5)]]),
    "a root that does not wait": (Protocol(root_waits=False), [[Call("broadcast", 5)]]),
    "a pull without its last hop": (Protocol(last_hop=False), [[Call("pull")] * 2, [Call("pull_twice")]]),
    "a pull without its first hop": (Protocol(first_hop=False), [[Call("pull")], [Call("pull_twice")]]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake):
    protocol, programs = MISTAKES[mistake]
    for calls in programs:
        found = search(2, [calls], protocol)
        assert found.kind in ("value", "order"), f"{[str(c) for c in calls]}: {found}"
        assert found.text
