"""The bench by hand: what is held against what, and that every size goes through commplane; FlashInfer in `commplane bench`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flashinfer_double import Machine, ranks_on

from commplane.api import Collective
from commplane.bench.cases import form, make_cases
from commplane.bench.measure import steps
from commplane.runtime import Plane

pytestmark = pytest.mark.timeout(60)

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("by_hand", "hand_calls", "hand_rows")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import by_hand

    yield by_hand
    for name in NAMES:
        sys.modules.pop(name, None)


def rows(bench: ModuleType, **times: float) -> dict[str, Any]:
    made = [bench.Row("all_reduce_rms_norm", None, name.replace("__", ":"), 8192, us) for name, us in times.items()]
    return {row.candidate: row for row in bench.compared(made, bench.POLICIES)}


def test_the_call_through_commplane_is_held_against_the_call_by_hand(bench: ModuleType) -> None:
    found = rows(bench, by_hand=4.0, by_hand__two_shot=3.0, flashinfer=4.2, custom_ar=1.0)
    assert (found["flashinfer"].ratio, found["flashinfer"].against) == (1.05, "by_hand")
    assert [found[name].ratio for name in ("by_hand", "by_hand:two_shot", "custom_ar")] == [None, None, None]


def test_a_policy_is_held_against_the_fastest_of_what_it_chooses_from(bench: ModuleType) -> None:
    times = {"by_hand": 1.0, "flashinfer": 4.0, "custom_ar": 3.0, "pair__torch": 6.0, "pair__custom_ar": 2.0}
    found = rows(bench, **times, policy=2.2, **{"policy__flashinfer+torch": 4.4})
    assert (found["policy"].ratio, found["policy"].against) == (1.1, "pair:custom_ar")
    assert (found["policy:flashinfer+torch"].ratio, found["policy:flashinfer+torch"].against) == (1.1, "flashinfer")


def test_the_worst_ratio_of_each_names_its_size_and_counts_those_above_what_is_wanted(bench: ModuleType) -> None:
    made = []
    for nbytes, ours in ((8192, 4.0), (65536, 4.4), (262144, 4.04)):
        made += bench.compared(
            [bench.Row("all_reduce_rms_norm", None, name, nbytes, us) for name, us in (("by_hand", 4.0), ("flashinfer", ours))],
            {},
        )
    (name, found), *others = bench.worst(made).items()
    assert (name, others) == ("flashinfer", [])
    assert (found["ratio"], found["bytes"], found["above"], found["of"]) == (1.1, 65536, 1, 3)
    assert "flashinfer: worst ratio 1.100 (norm of 64 KiB against by_hand); above 1.03 at 1 of 3" in bench.table(made)


def test_flashinfer_has_every_size_of_the_bench_through_commplane_and_as_a_pair(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To tune at these sizes takes a minute on CPU; which backends there are to choose from does not depend on it.
    monkeypatch.setattr(bench.Bench, "_tune", lambda self, name, comm: None)
    options = bench.arguments([])
    options.device = "cpu"

    def rank(plane: Plane) -> dict[int, tuple[set[str], set[str]]]:
        with ExitStack() as stack:
            made = bench.Bench(plane, stack, options)
            return {
                n: ({name for name, _, _ in made._whole(bench.FUSED, n, "sum")}, {name for name, _ in made._pairs(n)})
                for n in options.sizes
            }

    for found in ranks_on(Machine(), 2, rank):
        assert set(found) == {n << 10 for n in (8, 64, 256, 1024, 4096, 8192, 16384, 32768)}
        for nbytes, (whole, pairs) in found.items():
            assert {"flashinfer", "policy", "policy:flashinfer+torch"} <= whole, nbytes
            assert {"flashinfer", "torch"} <= pairs, nbytes


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_each_algorithm_is_a_candidate_of_commplane_bench_by_its_name(algorithm: str) -> None:
    machine, asked = Machine(), f"flashinfer:{algorithm}"

    def rank(plane: Plane) -> list[str]:
        todo = steps(plane, collectives=[Collective.ALL_REDUCE], op="sum", dtypes=["bfloat16"], sizes=[1 << 16], hidden=4096)
        formed = form(plane, [asked], "bench")
        cases = make_cases(plane, formed, todo[0])
        for case in cases:
            case.call()
        for comm in formed.values():
            comm.close()
        return [case.backend for case in cases]

    assert ranks_on(machine, 2, rank) == [["torch", asked]] * 2
    assert [machine.comm(r).calls[-1]["use_oneshot"] for r in range(2)] == [algorithm == "one_shot"] * 2
