"""Measuring on ranks: every collective, the pair that a fused one replaces, and the layers of a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import commplane
from commplane import errors
from commplane.api import Collective, ReduceOp
from commplane.bench import NULL, Row, Step, Subject, describe, form, form_null, measure, measure_overhead, pinnings, steps
from commplane.bench.overhead import CALLS
from commplane.bench.pair import fastest, fused, pairs
from commplane.bench.timing import Runner, take_turn
from commplane.runtime import Plane
from commplane.testing import run_processes, run_threads


def run(world_size: int, function: Callable[[Plane], Any]) -> list[Any]:
    out = run_threads(world_size, function, config=lambda _rank: {"timeout": 30}, timeout=120)
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def everything(plane: Plane, **changes: Any) -> list[Row]:
    wanted: dict[str, Any] = {
        "collectives": [c for c in Collective if c is not Collective.ALL_REDUCE_RMS_NORM_QUANT],
        "op": "sum",
        "dtypes": ["float32"],
        "sizes": [64, 256],
        "hidden": 16,
    }
    todo = steps(plane, **wanted | changes)
    return measure(plane, form(plane, None, "bench"), todo, pin="off", rounds=1)


def test_every_collective_is_measured_at_every_size_and_every_rank_has_the_same_rows() -> None:
    out = run(2, everything)
    assert out[0] == out[1]
    found = {(r.collective, r.mode, r.dtype, r.bytes) for r in out[0]}
    sized = [c for c in Collective if c not in (Collective.BARRIER, Collective.ALL_REDUCE_RMS_NORM_QUANT)]
    wanted = {
        (str(c), "pair" if c is Collective.ALL_REDUCE_RMS_NORM else "staged", "float32", n) for c in sized for n in (64, 256)
    }
    assert found == wanted | {("barrier", "staged", None, 0)}
    for r in out[0]:
        assert (r.backend, r.ranks, r.device, r.pinned, r.vs_torch) == ("torch", 2, "cpu", False, 1.0)
        assert 0 < r.median_us <= r.p99_us
        assert r.op == ("sum" if r.collective in ("all_reduce", "reduce_scatter") else None)
        assert (r.hidden, r.detail is None) == ((16, False) if r.collective == "all_reduce_rms_norm" else (None, True))


def test_sizes_that_come_to_the_same_elements_are_measured_once() -> None:
    def rank_main(plane: Plane) -> list[int]:
        made = steps(plane, collectives=[Collective.REDUCE_SCATTER], op="max", dtypes=["int32"], sizes=[1, 8, 9, 16], hidden=1)
        return [s.nbytes for s in made]

    assert run(2, rank_main) == [[8, 16], [8, 16]]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"dtypes": ["flot"]}, errors.ConfigError, "torch has no dtype flot"),
        ({"collectives": list(Collective)}, errors.ConfigError, "all_reduce_rms_norm_quant is measured by commplane tune"),
        ({"dtypes": ["int8", "float32"]}, errors.ConfigError, "all_reduce_rms_norm wants floating-point dtypes, found int8"),
        (
            {"dtypes": ["int8"], "op": "avg", "collectives": [Collective.ALL_REDUCE]},
            errors.UnsupportedOperation,
            "no backend serves all_reduce avg int8 64 bytes",
        ),
    ],
)
def test_what_nobody_can_measure_is_refused_on_every_rank(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    def rank_main(plane: Plane) -> None:
        with pytest.raises(error, match=words):
            everything(plane, **changes)

    run(2, rank_main)


def test_a_broadcast_comes_from_each_rank_in_turn() -> None:
    def rank_main(plane: Plane) -> set[int]:
        comm = plane.communicator("bench_torch")
        roots = []
        broadcast = comm.broadcast
        comm.broadcast = lambda tensor, src=0: (roots.append(src), broadcast(tensor, src))[1]  # type: ignore[method-assign]
        todo = steps(plane, collectives=[Collective.BROADCAST], op="sum", dtypes=["float32"], sizes=[64], hidden=1)
        (row,) = measure(plane, {"torch": comm}, todo, pin="off", rounds=1)
        assert [roots.count(r) for r in range(3)] == [len(roots) // 3] * 3
        assert roots[:6] == [0, 1, 2, 0, 1, 2]
        assert row.iterations % 3 == 0
        return set(roots)

    assert run(3, rank_main) == [{0, 1, 2}] * 3


def test_every_way_to_write_the_pair_gives_what_the_communicator_gives() -> None:
    def rank_main(plane: Plane) -> None:
        comm = plane.communicator("tp")
        torch.manual_seed(0)
        shape = (3, 8)
        parts = [torch.randn(shape) for _ in range(2)]
        residual, weight = torch.randn(shape), torch.randn(8)
        norm, total = comm.all_reduce_rms_norm(parts[comm.rank].clone(), residual.clone(), weight)
        for ways in (pairs, fused):
            for name in ways(comm, parts[0], residual, weight):
                made = ways(comm, parts[comm.rank].clone(), residual.clone(), weight)[name]()
                torch.testing.assert_close(made[0], norm, msg=name)
                torch.testing.assert_close(made[1], total, msg=name)

    run(2, rank_main)


@pytest.mark.parametrize("ways", [pairs, fused])
def test_all_ranks_take_the_same_way(ways: Callable[..., Any]) -> None:
    def rank_main(plane: Plane) -> str:
        comm = plane.communicator("tp")
        name, call = fastest(plane, comm, ways(comm, torch.zeros(2, 8), torch.zeros(2, 8), torch.ones(8)))
        norm, total = call()
        assert not norm.any() and not total.any()
        return name

    first, second = run(2, rank_main)
    assert first == second


def test_the_bare_call_of_torch_is_an_all_reduce_and_there_is_none_for_avg() -> None:
    def rank_main(plane: Plane) -> None:
        comm = plane.communicator("tp")
        (backend,) = comm.backends
        for op, wanted in ((ReduceOp.SUM, 3.0), (ReduceOp.MAX, 2.0), (ReduceOp.MIN, 1.0)):
            x = torch.full((5,), float(comm.rank + 1))
            call = backend.bare(x, op)
            assert call is not None
            call()
            assert x.tolist() == [wanted] * 5
            call()
            assert x.tolist() == [wanted * (2 if op is ReduceOp.SUM else 1)] * 5
        assert backend.bare(x, ReduceOp.AVG) is None

    run(2, rank_main)


def test_a_group_without_transport_is_one_rank_whose_all_reduce_is_the_identity() -> None:
    def rank_main(plane: Plane) -> None:
        comm = form_null(plane)
        assert (comm.plan.backends[0], comm.ranks) == (NULL, (plane.rank,))
        x = torch.arange(4.0)
        assert comm.all_reduce_(x) is x
        y = comm.all_reduce(x)
        assert y is not x and y.data_ptr() != x.data_ptr() and y.tolist() == x.tolist() == [0.0, 1.0, 2.0, 3.0]
        comm.close()
        form_null(plane).close()  # the plugin is there already

    run(2, rank_main)


def test_no_other_group_gets_the_backend_without_transport() -> None:
    def rank_main(plane: Plane) -> None:
        form_null(plane)
        comm = plane.communicator("tp")
        assert comm.plan.backends == ("torch",)
        assert form(plane, None, "bench").keys() == {"torch"}

    run(2, rank_main)


def small(plane: Plane) -> Step:
    (step,) = steps(plane, collectives=[Collective.ALL_REDUCE], op="sum", dtypes=["float32"], sizes=[64], hidden=1)
    return step


def test_every_layer_of_every_communicator_is_measured() -> None:
    def rank_main(plane: Plane) -> list[Any]:
        subjects = [Subject("torch", plane.communicator("overhead_torch"), True), Subject(NULL, form_null(plane), True)]
        told: list[str] = []
        rows = measure_overhead(plane, subjects, small(plane), pin=[False], rounds=2, progress=told.append)
        assert len(told) == 4, told  # calibration, the uncounted round, two rounds
        return rows

    out = run(2, rank_main)
    assert out[0] == out[1]
    assert [(r.backend, r.call, r.ranks) for r in out[0]] == [
        (backend, call, ranks) for backend, ranks in (("torch", 2), (NULL, 1)) for call in CALLS
    ]
    for r in out[0]:
        assert 0 < r.time.low_ns <= r.time.median_ns <= r.time.high_ns
        assert r.over_bare is not None and (r.call != "bare" or r.over_bare.median_ns == 0)
        assert r.over_unrecorded is None
        assert (r.bytes, r.dtype, r.op, r.pinned, r.flight_records) == (64, "float32", "sum", False, True)


def test_the_machine_is_described_with_what_was_measured() -> None:
    def rank_main(plane: Plane) -> dict[str, Any]:
        formed = form(plane, None, "bench")
        return describe(plane, formed.values(), ["bench", "--sizes", "64 B"])

    machine = run(2, rank_main)[0]
    assert machine["command"] == "commplane bench --sizes '64 B'"
    assert machine["cores"] == len(os.sched_getaffinity(0)) and machine["ranks"] == 2
    assert machine["torch"] == torch.__version__ and machine["wheels"] == {"commplane": commplane.__version__}
    assert machine["backends"] == {"torch": {}}


def as_the_default(plane: Plane) -> list[bool]:
    return pinnings(plane, form(plane, None, "bench").values(), None)


def test_without_a_choice_both_are_measured_where_ranks_do_not_outnumber_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert run(1, as_the_default) == [[True, False]]
    assert run(cores + 1, as_the_default) == [[False]] * (cores + 1)


def affinities() -> list[list[int]]:
    return [sorted(os.sched_getaffinity(int(p.name))) for p in Path("/proc/self/task").iterdir()]


def turns(store: Any, rank: int, world_size: int) -> dict[str, Any]:
    config = {"timeout": 30, "plugins": ["torch"]}
    with commplane.init(store=store, rank=rank, world_size=world_size, config=config) as plane:
        comm = plane.communicator("tp")
        x, seen = torch.ones(4), []

        def call() -> None:
            comm.all_reduce_(x)
            seen.append(affinities())

        core = sorted(plane.facts[rank].cores)[-1]
        for where in (core, None):
            take_turn(Runner(comm, call, where), 2)
        return {
            "core": core,
            "pinned": seen[:3],
            "free": seen[3:],
            "after": affinities(),
            "home": sorted(plane.facts[rank].cores),
        }


def test_the_threads_of_a_transport_are_on_the_core_in_a_pinned_turn_and_free_in_the_next() -> None:
    for o in run_processes(2, turns):
        assert o.error is None, o.output
        r = o.result
        assert len(r["pinned"]) == len(r["free"]) == 3  # one of them not counted
        for masks in r["pinned"]:
            assert len(masks) > 1 and all(mask == [r["core"]] for mask in masks), r
        for masks in [*r["free"], r["after"]]:
            assert all(mask == r["home"] for mask in masks), r


def pinned_rows(store: Any, rank: int, world_size: int) -> list[Any]:
    config = {"timeout": 30, "plugins": ["torch"]}
    with commplane.init(store=store, rank=rank, world_size=world_size, config=config) as plane:
        todo = steps(
            plane, collectives=[Collective.ALL_REDUCE], op="max", dtypes=["int32"], sizes=[64], hidden=1, out_of_place=True
        )
        return [r.to_json() for r in measure(plane, form(plane, ["torch"], "bench"), todo, pin="both", rounds=1)]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_pinned_and_free_are_rows_of_one_run_also_with_more_ranks_than_cores(world_size: int) -> None:
    for o in run_processes(world_size, pinned_rows, timeout=120):
        assert o.error is None, o.output
        assert [(r["pinned"], r["op"], r["dtype"], r["in_place"]) for r in o.result] == [
            (True, "max", "int32", False),
            (False, "max", "int32", False),
        ]
        assert max(r["vs_torch"] for r in o.result) == 1.0


def test_a_backend_that_may_not_reduce_here_is_left_out_of_the_layers() -> None:
    def rank_main(plane: Plane) -> set[str]:
        subjects = [Subject("torch", plane.communicator("overhead_torch"), False), Subject(NULL, form_null(plane), False)]
        return {r.backend for r in measure_overhead(plane, subjects, small(plane), pin=[False], rounds=1)}

    out = run_threads(2, rank_main, config=lambda _rank: {"numerics": "rank_order"})
    assert out == [{NULL}] * 2, out
