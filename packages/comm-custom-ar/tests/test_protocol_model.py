# SPDX-License-Identifier: Apache-2.0
"""The flag protocol of csrc/cpu/comm.h, checked exhaustively for 2 and 3 ranks; protocol_model.py says what that means.

Longer sequences for 3 ranks: `nox -s model`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from protocol_model import Data, Load, Location, Operation, Program, Result, Store, explore
from protocol_programs import COLLECTIVES, program
from protocol_ranks import PRESENT, Call, Protocol
from protocol_search import CATALOGUE, FEW, alone, search, sequences

SOURCES = Path(__file__).parents[1] / "csrc" / "cpu"
Record = Callable[[str, object], None]

pytestmark = pytest.mark.timeout(600)  # a loaded machine; the longest takes about 10 s of processor time


def _clean(result: Result, programs: int, least: int, record: Record) -> None:
    """No violation, every program ends, in one way, and what was explored is not nothing."""
    assert not result.violations, "\n".join(map(str, result.violations.values()))
    assert result.ends == programs
    assert result.places == result.states  # the argument for completeness, point 2
    assert result.states >= least
    record("states", result.states)
    print(f"{programs} programs: {result.states} states, {result.transitions} transitions")


# --- the explorer -------------------------------------------------------------------------------------------------------


def _two(first: list[Operation], second: list[Operation], *, lines: int = 1, word: bool = False) -> Program:
    """Two ranks, `lines` flag lines of rank 0 and one of rank 1, and one location."""
    return Program("litmus", (first, second), (Location("it", "old", word),), (*[0] * lines, 1))


NEW = Data("writes", 0, writes=((0, "new"),))
SEES_NEW = Data("reads", 0, reads=((0, "new"),))
SEES_OLD = Data("reads", 0, reads=((0, "old"),))


def test_a_message_that_is_released_and_acquired_passes_the_data():
    result = explore(_two([NEW, Store(0, 1)], [Load(0, 1), SEES_NEW]), merge=False)
    assert not result.violations and result.ends == 1


@pytest.mark.parametrize(("release", "acquire"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize(("word", "kind"), [(False, "race"), (True, "word")])
def test_without_release_or_acquire_nothing_is_ordered(release, acquire, word, kind):
    ranks = [NEW, Store(0, 1, release=release)], [Load(0, 1, acquire=acquire), SEES_NEW]
    assert set(explore(_two(*ranks, word=word), merge=False).violations) == {kind}
    assert set(explore(_two(*ranks, word=word), merge=True).violations) == {kind}


def test_two_accesses_race_whichever_comes_first():
    result = explore(_two([NEW], [SEES_OLD]), merge=False, everything=True)
    texts = {v.text.split(" before ")[0] for v in result.violations.values()}
    assert set(result.violations) == {"race"} and len(texts) == 1
    reversed_roles = explore(_two([SEES_OLD], [NEW]), merge=False, everything=True)
    assert set(reversed_roles.violations) == {"race"}


@pytest.mark.parametrize(("release", "ends"), [(False, 2), (True, 1)])
def test_a_load_may_be_stale_until_happens_before_forbids_it(release, ends):
    """Message passing between two flags: the second is seen, the first may still look unset. Two final states, or one."""
    writer: list[Operation] = [Store(0, 1), Store(1, 1, release=release)]
    reader: list[Operation] = [Load(1, 1, acquire=True), Load(0, 1, acquire=False, equal=1, other=2), Store(2, 1), Store(2, 2)]
    assert explore(_two(writer, reader, lines=2)).ends == ends


def test_a_rank_never_reads_an_older_message_than_before():
    writer: list[Operation] = [Store(0, 1), Store(0, 2)]
    stale = Data("reads what nobody wrote", 0, reads=((0, "going back"),))
    once = [Load(0, 2, acquire=False, equal=1, other=4), Load(0, 1, acquire=False, equal=1, other=2), stale, NEW]
    result = explore(_two(writer, once), everything=True)
    assert set(result.violations) == {"lost flag"}  # looked for 1 where 2 stands, and never found it


def test_store_buffering_is_explored():
    """Both ranks store, then look at the other's flag: either, none, and also both may find it unset. Sequentially only three."""
    ranks: list[list[Operation]] = [
        [Store(rank, 1), Load(1 - rank, 1, equal=2, other=1), Data("finds it unset", 0, writes=((rank, "unset"),))]
        for rank in (0, 1)
    ]
    assert explore(Program("litmus", ranks, (Location("a"), Location("b")), (0, 1))).ends == 4


def test_a_step_that_is_never_published_is_a_deadlock_and_one_overwritten_is_lost():
    assert set(explore(_two([], [Load(0, 1)])).violations) == {"deadlock"}
    assert set(explore(_two([Store(0, 1), Store(0, 2)], [Load(0, 1)]), everything=True).violations) == {"lost flag"}


def test_programs_outside_the_class_are_refused():
    for second in ([Store(0, 1)], [Store(1, 2), Store(1, 1)], [Load(0, 1, equal=0)]):
        with pytest.raises(ValueError, match="rank 1"):
            _two([], second)
    with pytest.raises(ValueError, match="rank 1 may not write it"):
        _two([NEW], [NEW], word=True)


# --- the model and the code ---------------------------------------------------------------------------------------------

# What the algorithms do, in the order of the file; protocol_programs.py mirrors it.
STRUCTURE = {
    "comm.h": "publish step.store await step.load step.load step.load hop publish await hop hop",
    "pipeline.h": "hop fill publish fill publish await drain",
    "all_reduce_one_shot.cc": "pipelined memcpy reduce",
    "all_reduce_two_shot.cc": "hop memcpy memcpy publish fill await reduce publish fill await memcpy",
    "all_reduce_symmetric.cc": "hop reduce hop hop reduce hop",
    "all_reduce_single_copy.cc": "publish await read_peer reduce publish await read_peer hop",
    "all_reduce_rms_norm.cc": "pipelined memcpy pipelined memcpy hop hop all_reduce_two_shot hop",
    "all_gather.cc": "memcpy hop memcpy copy_own hop pipelined memcpy memcpy copy_own",
    "reduce_scatter.cc": "hop reduce hop pipelined memcpy reduce",
    "broadcast.cc": "hop memcpy hop pipelined memcpy memcpy",
    "barrier.cc": "hop",
}


def _code(name: str) -> str:
    """Without comments. last_hop() is a hop that looks at the abort words once more, which the model leaves out."""
    return re.sub(r"//[^\n]*", "", (SOURCES / name).read_text()).replace("last_hop(", "hop(")


@pytest.mark.parametrize("name", STRUCTURE)
def test_the_code_has_the_structure_that_the_model_mirrors(name):
    code = _code(name)
    if name == "comm.h":  # from publish() on, without the declarations between
        code = re.sub(r"\[\[gnu::cold\]\][^;]*;", "", code[code.index("inline void publish") :])
    code = re.sub(r"^int read_peer.*?^}|^int single_copy_probe.*", "", code, flags=re.S | re.M)  # not part of the algorithm
    code = re.sub(r"^(int|void) \w+\(", "", code, flags=re.M)  # definitions
    calls = re.findall(
        r"\b(publish|await|hop|pipelined|fill|drain|memcpy|reduce|read_peer|copy_own|all_reduce_two_shot|step\.(?:load|store))\(",
        re.sub(r"line\.step", "step", code),
    )
    assert " ".join(calls) == STRUCTURE[name], f"{name} has changed: make protocol_programs.py do the same, then this line"


def test_every_file_that_meets_peers_is_modelled():
    meets = {path.name for path in SOURCES.iterdir() if re.search(r"\b(hop|publish|pipelined)\(", _code(path.name))}
    assert meets <= set(STRUCTURE), "a new collective needs a program in protocol_programs.py"
    used = {call.kind for call in CATALOGUE}
    assert used == set(COLLECTIVES) == {call.kind for call in FEW} | {"all_gather", "broadcast"}


def test_ring_and_memory_orders_are_those_of_the_code():
    code = _code("comm.h")
    assert f"kRing = {PRESENT.ring};" in code
    publish = code[code.index("inline void publish") : code.index("inline bool any_aborted")]
    assert re.findall(r"memory_order_\w+", publish) == ["memory_order_relaxed"] * 2 + ["memory_order_release"]
    wait = code[code.index("inline int await(") : code.index("inline int hop(")]
    flags = re.findall(r"step\.load\(std::memory_order_(\w+)\)", wait)
    assert flags == ["acquire", "relaxed", "acquire"]


# --- the proof ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "least"), [(2, 7_000), pytest.param(3, 300_000, marks=pytest.mark.long)])
def test_every_collective_alone_is_right(world, least, record_property):
    _clean(search(world, alone(CATALOGUE)), len(CATALOGUE), least, record_property)


def test_two_ranks_do_every_pair_of_calls_right(record_property):
    programs = sequences(CATALOGUE, 2)
    _clean(search(2, programs), len(programs), 900_000, record_property)


@pytest.mark.parametrize("first", FEW, ids=str)
def test_three_ranks_do_every_pair_of_calls_right(first, record_property):
    programs = [(first, second) for second in FEW]
    _clean(search(3, programs), len(programs), 20_000, record_property)


def test_two_ranks_do_every_triple_of_calls_right(record_property):
    programs = sequences(FEW, 3)
    _clean(search(2, programs, careful=False), len(programs), 200_000, record_property)


@pytest.mark.parametrize(("world", "most", "least"), [(2, 6, 23_000), (3, 2, 50_000)])
def test_every_plain_access_on_its_own_changes_nothing(world, most, least, record_property):
    """The same with every operation interleaved: `merge` loses nothing."""
    programs = alone([call for call in CATALOGUE if call.chunks <= most])
    _clean(search(world, programs, careful=world == 2, merge=False), len(programs), least, record_property)


# --- mistakes -----------------------------------------------------------------------------------------------------------

ONE_SHOT, TWO_SHOT, SINGLE_COPY = "all_reduce_one_shot", "all_reduce_two_shot", "all_reduce_single_copy"
PIPELINES = (ONE_SHOT, "all_gather", "reduce_scatter", "broadcast")
SYMMETRIC = ("all_reduce_symmetric", "all_gather_symmetric", "reduce_scatter_symmetric", "broadcast_symmetric")
OUT_OF_PLACE = [Call(kind, in_place=kind == "broadcast_symmetric") for kind in SYMMETRIC]

# What is wrong, how few ranks show it, the calls that do, and what is seen. "value" may hide what would come after it.
MISTAKES = {
    "a ring of three": (Protocol(ring=3), 2, [[Call(k, 5)] for k in (*PIPELINES, TWO_SHOT)], {"lost flag", "race", "word"}),
    "a ring of three, next call": (Protocol(ring=3), 2, [[Call(k, 2)] * 2 for k in PIPELINES], {"lost flag", "race", "word"}),
    "a ring of two": (Protocol(ring=2), 2, [[Call(k, 3)] for k in PIPELINES], {"lost flag", "word"}),
    "a ring of two, next call": (Protocol(ring=2), 2, [[Call(k, 2)] * 2 for k in PIPELINES], {"lost flag", "race", "word"}),
    "a ring of two, two-shot": (Protocol(ring=2), 2, [[Call(TWO_SHOT, 2)]], {"lost flag", "race", "word"}),
    "a ring of one": (Protocol(ring=1), 2, [[Call("barrier")] * 2], {"lost flag", "word"}),
    "two chunks ahead": (Protocol(ahead=2), 2, [[Call(k, 5)] for k in PIPELINES], {"lost flag", "race", "word"}),
    "two chunks ahead, next call": (Protocol(ahead=2), 2, [[Call(k, 3)] * 2 for k in PIPELINES], {"lost flag", "race", "word"}),
    "a relaxed store": (Protocol(release=False), 2, [[call] for call in FEW], {"word"}),
    "a relaxed store, nothing compared": (
        Protocol(release=False, compare=False),
        2,
        [[Call(ONE_SHOT)], [Call(TWO_SHOT)]],
        {"race"},
    ),
    "a relaxed load": (Protocol(acquire=False), 2, [[call] for call in FEW], {"word"}),
    "a relaxed load, nothing compared": (
        Protocol(acquire=False, compare=False),
        2,
        [[Call(ONE_SHOT)], [Call(TWO_SHOT)]],
        {"race"},
    ),
    "no second load": (Protocol(acquire_again=False), 2, [[call] for call in FEW], {"word"}),
    "no second load, nothing compared": (Protocol(acquire_again=False, compare=False), 2, [[Call(ONE_SHOT)]], {"race"}),
    "the flag before the words": (Protocol(words_first=False), 2, [[call] for call in FEW], {"word"}),
    "no last hop, in place": (Protocol(last_hop=False), 2, [[Call("all_reduce_symmetric")]], {"value"}),
    "no last hop": (Protocol(last_hop=False), 2, [[call] for call in OUT_OF_PLACE], {"caller"}),
    "no last hop, single copy": (Protocol(last_hop=False), 2, [[Call(SINGLE_COPY, 1, p)] for p in (True, False)], {"caller"}),
    "no first hop": (Protocol(first_hop=False), 2, [[Call(kind)] * 2 for kind in SYMMETRIC], {"value"}),
    "two-shot results beside the inputs": (Protocol(results_apart=False), 2, [[Call(TWO_SHOT)]], {"race"}),
    "work before the wait": (Protocol(wait_first=False), 2, [[Call(k)] for k in (*PIPELINES, TWO_SHOT)], {"race"}),
    "work before the wait, single copy": (Protocol(wait_first=False), 2, [[Call(SINGLE_COPY)]], {"word"}),
    "a root that does not wait": (Protocol(root_awaits=False), 2, [[Call("broadcast", 5)]], {"lost flag", "race", "word"}),
    "only the left neighbour": (Protocol(await_all=False), 3, [[Call(k)] for k in (*PIPELINES, TWO_SHOT)], {"race"}),
    "only the left neighbour, symmetric": (Protocol(await_all=False), 3, [[call] for call in OUT_OF_PLACE], {"caller"}),
    "only the left neighbour, in place": (Protocol(await_all=False), 3, [[Call("all_reduce_symmetric")]], {"race", "value"}),
    "only the left neighbour, single copy": (Protocol(await_all=False), 3, [[Call(SINGLE_COPY)]], {"word"}),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake):
    protocol, world, programs, kinds = MISTAKES[mistake]
    for calls in programs:
        result = explore(program(world, calls, protocol), everything=True)
        assert kinds <= set(result.violations), f"{[str(c) for c in calls]}: {[str(v) for v in result.violations.values()]}"
        for kind in kinds:
            assert result.violations[kind].trace  # the run that leads there


@pytest.mark.parametrize("mistake", [name for name, (_, world, _, _) in MISTAKES.items() if world == 3])
def test_two_ranks_do_not_show_it(mistake):
    """So 3 ranks are not for nothing."""
    protocol = MISTAKES[mistake][0]
    assert not search(2, alone(CATALOGUE), protocol).violations
    assert not search(2, sequences(FEW, 2), protocol, careful=False).violations


def test_full_interleaving_finds_the_same_mistakes():
    """Merged or not, one load a wait or all: the verdict is the same for every mistake and every collective."""
    checked = 0
    for protocol in {protocol for protocol, _, _, _ in MISTAKES.values() if protocol.acquire_again}:
        for calls in [*alone(FEW), *([call, call] for call in FEW)]:
            verdicts = {
                bool(search(2, [calls], protocol, careful=careful, merge=merge).violations)
                for careful in (True, False)
                for merge in (True, False)
            }
            assert len(verdicts) == 1, f"{protocol}: {[str(c) for c in calls]}"
            checked += 1
    assert checked > 300


ONE_STEP_OPEN = [call for call in FEW if call.kind in SYMMETRIC or call.kind in ("barrier", SINGLE_COPY) or call.chunks == 1]


@pytest.mark.parametrize("world", [2, 3])
def test_two_lines_would_do_where_one_step_is_open_and_a_pipeline_needs_all_four(world):
    assert len(ONE_STEP_OPEN) >= 10
    assert not search(world, sequences(ONE_STEP_OPEN, 2), Protocol(ring=2), careful=False).violations
    for kind in PIPELINES:
        assert not search(world, alone([Call(kind, 2)]), Protocol(ring=3), careful=False).violations
        assert search(world, [[Call(kind, 2)] * 2], Protocol(ring=3), careful=False).violations
