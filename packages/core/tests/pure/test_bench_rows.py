"""What is decided without measuring: sizes, numbers of calls, ratios, and what people are shown."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commplane.api import Collective
from commplane.bench import OverheadRow, Row, Step, overhead_table, plot, table
from commplane.bench.machine import in_words, read_caches, read_cpu
from commplane.bench.measure import compare
from commplane.bench.overhead import Spread, difference, turn_size
from commplane.bench.timing import calls_for, p99

ROW = Row(
    collective="all_reduce",
    op="sum",
    backend="custom_ar",
    mode="staged",
    in_place=True,
    pinned=False,
    dtype="float32",
    bytes=65536,
    hidden=None,
    ranks=2,
    device="cpu",
    graph=False,
    median_us=12.5,
    p99_us=20.25,
    iterations=100,
    vs_torch=3.24,
)
TORCH = replace(ROW, backend="torch", median_us=40.5, vs_torch=1.0)


def test_a_row_as_json_has_exactly_these_keys() -> None:
    assert json.loads(json.dumps(ROW.to_json())) == {
        "collective": "all_reduce",
        "op": "sum",
        "backend": "custom_ar",
        "mode": "staged",
        "in_place": True,
        "pinned": False,
        "dtype": "float32",
        "bytes": 65536,
        "hidden": None,
        "ranks": 2,
        "device": "cpu",
        "graph": False,
        "median_us": 12.5,
        "p99_us": 20.25,
        "iterations": 100,
        "vs_torch": 3.24,
        "vs_pair": None,
        "detail": None,
        "algorithm": None,
        "groups": 1,
    }


def step(collective: str, nbytes: int, world_size: int = 2, hidden: int = 4096, out_of_place: bool = False) -> Step:
    return Step.of(
        Collective(collective),
        op="max",
        dtype="float32",
        nbytes=nbytes,
        itemsize=4,
        world_size=world_size,
        hidden=hidden,
        out_of_place=out_of_place,
    )


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "broadcast"])
def test_bytes_are_those_of_the_input_rounded_down_to_elements(collective: str) -> None:
    assert [step(collective, n).nbytes for n in (0, 3, 4, 64, 67)] == [4, 4, 4, 64, 64]


def test_the_input_of_a_reduce_scatter_is_divided_by_the_ranks() -> None:
    assert [step("reduce_scatter", n, world_size=3).count for n in (0, 4, 12, 64)] == [3, 3, 3, 15]


@pytest.mark.parametrize(("nbytes", "count", "hidden"), [(64, 16, 16), (16384, 4096, 4096), (40000, 8192, 4096)])
def test_the_fused_collective_has_whole_rows_of_hidden_elements(nbytes: int, count: int, hidden: int) -> None:
    made = step("all_reduce_rms_norm", nbytes)
    assert (made.count, made.hidden) == (count, hidden)


@given(st.sampled_from(list(Collective)), st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 10000))
def test_every_step_has_an_input_that_its_collective_takes(c: Collective, nbytes: int, world_size: int, hidden: int) -> None:
    made = step(str(c), nbytes, world_size, hidden)
    assert made.count > 0 or c is Collective.BARRIER
    assert c is not Collective.REDUCE_SCATTER or made.count % world_size == 0
    assert made.hidden is None or made.count % made.hidden == 0
    assert made.nbytes <= max(nbytes, 4 * (world_size if c is Collective.REDUCE_SCATTER else 1))


def test_a_barrier_has_neither_dtype_nor_size_so_that_one_is_measured() -> None:
    other = Step.of(Collective.BARRIER, op="sum", dtype="int8", nbytes=7, itemsize=1, world_size=2, hidden=1)
    assert step("barrier", 64) == other
    assert (other.dtype, other.op, other.nbytes, str(other)) == (None, None, 0, "barrier")


def test_only_reductions_have_an_op() -> None:
    assert {str(c) for c in Collective if step(str(c), 64).op == "max"} == {"all_reduce", "reduce_scatter"}
    assert str(step("all_reduce", 64)) == "all_reduce max float32 64 bytes"


def test_in_place_is_what_writes_to_its_input_and_an_all_reduce_can_be_asked_not_to() -> None:
    assert {str(c) for c in Collective if step(str(c), 64).in_place} == {"all_reduce", "broadcast"}
    assert {str(c) for c in Collective if step(str(c), 64, out_of_place=True).in_place} == {"broadcast"}


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [(0.0, 1000), (1e-6, 1000), (1e-4, 200), (0.005, 4), (0.1, 3), (0.2, 1), (5.0, 1)],
)
def test_calls_fill_a_turn_and_few_are_made_where_they_are_slow(seconds: float, calls: int) -> None:
    assert calls_for(seconds) == calls


def test_the_99th_percentile_is_a_value_that_was_measured() -> None:
    assert p99([3.0]) == 3.0
    assert p99([float(n) for n in range(1000)]) == 990.0


def test_torch_is_compared_at_its_better_of_pinned_and_free() -> None:
    rows = [
        replace(TORCH, pinned=True, median_us=400.0),
        replace(TORCH, median_us=300.0),
        replace(ROW, pinned=True, median_us=3.0),
        replace(ROW, median_us=2.0),
        replace(ROW, mode="symmetric", median_us=1.0),
    ]
    assert [r.vs_torch for r in compare(rows)] == [0.75, 1.0, 100.0, 150.0, 300.0]
    assert all(r.vs_pair is None for r in compare(rows))


def test_without_torch_there_is_no_ratio() -> None:
    assert compare([ROW])[0].vs_torch is None


def test_a_fused_row_is_compared_with_the_pair_of_its_own_backend_and_kind_of_tensor() -> None:
    def row(mode: str, median: float, *, pinned: bool = False, backend: str = "custom_ar") -> Row:
        return replace(
            ROW, collective="all_reduce_rms_norm", mode=mode, median_us=median, pinned=pinned, backend=backend, vs_torch=None
        )

    rows = [
        row("pair", 1000.0, backend="torch"),
        row("fused", 10.0),
        row("pair", 30.0, pinned=True),
        row("pair", 20.0),
        row("fused symmetric", 5.0),
        row("pair symmetric", 8.0),
    ]
    assert [r.vs_pair for r in compare(rows)] == [None, 2.0, None, None, 1.6, None]
    assert [r.vs_torch for r in compare(rows)] == [1.0, 100.0, 33.33, 50.0, 200.0, 125.0]


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_the_table_has_a_column_a_backend_and_a_line_a_size() -> None:
    small = replace(ROW, bytes=64, median_us=1.5, vs_torch=None)
    title, *lines = table([TORCH, ROW, small]).splitlines()
    assert title == "all_reduce sum, float32, 2 ranks, cpu, not pinned: median us a call (times torch)"
    assert words("\n".join(lines)) == [
        ["bytes", "torch", "custom_ar", "staged"],
        ["64", "KiB", "40.50", "12.50", "(3.2x)"],
        ["64", "B", "-", "1.50"],
    ]


def test_what_was_measured_both_ways_has_two_columns_side_by_side() -> None:
    rows = [replace(r, pinned=on, median_us=r.median_us + on) for r in (TORCH, ROW) for on in (True, False)]
    title, *lines = table(rows).splitlines()
    assert title.endswith("cpu: median us a call (times torch at its better)")
    assert words("\n".join(lines)) == [
        ["torch", "custom_ar", "staged"],
        ["bytes", "pinned", "free", "pinned", "free"],
        ["64", "KiB", "41.50", "40.50", "13.50", "(3.2x)", "12.50", "(3.2x)"],
    ]


def test_a_table_of_graphs_says_so_and_candidates_of_one_backend_have_a_column_each() -> None:
    in_graph = replace(ROW, device="cuda", graph=True, backend="torch_symm:one_shot", algorithm="one_shot")
    other = replace(in_graph, backend="torch_symm:two_shot", algorithm="two_shot", median_us=3.0)
    title, *lines = table([in_graph, other]).splitlines()
    assert title == "all_reduce sum, float32, 2 ranks, cuda graph, not pinned: median us a call (times torch)"
    assert lines[0].split() == ["bytes", "torch_symm:one_shot", "staged", "torch_symm:two_shot", "staged"]


def test_below_the_table_stands_which_algorithm_a_backend_ran_at_which_size() -> None:
    algorithms = {64: "push", 1024: "push", 65536: "two_shot"}
    rows = [TORCH, *(replace(ROW, bytes=n, algorithm=a) for n, a in algorithms.items()), replace(ROW, bytes=64, pinned=True)]
    assert table(rows).splitlines()[-1] == "custom_ar staged: push at 64 B, 1 KiB; two_shot at 64 KiB"
    assert "push" not in table([replace(r, algorithm=None) for r in rows])


def test_pinned_rows_alone_say_so_in_the_title() -> None:
    assert ", cpu, pinned: median" in table([replace(ROW, pinned=True)])


@pytest.mark.parametrize("ways", [[False], [True, False]])
def test_the_table_keeps_its_columns_in_line(ways: list[bool]) -> None:
    rows = [TORCH, ROW, replace(ROW, mode="symmetric"), replace(TORCH, bytes=64), replace(ROW, bytes=64, median_us=1e7)]
    _title, *lines = table([replace(r, pinned=on) for r in rows for on in ways]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_where_something_is_fused_the_table_shows_what_it_gains_over_its_pair() -> None:
    pair = replace(ROW, collective="all_reduce_rms_norm", op=None, mode="pair", in_place=False)
    fused = replace(pair, mode="fused", vs_torch=250.0, vs_pair=1.314)
    title, head, line = table([fused, pair]).splitlines()
    assert title == "all_reduce_rms_norm, float32, 2 ranks, cpu, not pinned: median us a call (times its own pair)"
    assert head.split() == ["bytes", "custom_ar", "fused", "custom_ar", "pair"]
    assert line.split()[2:] == ["12.50", "(1.31x)", "12.50"]
    assert table([pair]).splitlines()[-1].split()[2:] == ["12.50", "(3.2x)"]  # with nothing fused, against torch


def test_a_barrier_has_no_size_and_no_kind_of_tensor() -> None:
    _title, head, line = table([replace(ROW, collective="barrier", op=None, dtype=None, bytes=0)]).splitlines()
    assert head.split() == ["bytes", "custom_ar"]
    assert line.split()[0] == "-"


def test_each_collective_and_dtype_has_a_table_of_its_own_with_only_its_own_columns() -> None:
    other = [replace(TORCH, dtype="int8"), replace(TORCH, collective="all_gather", op=None, in_place=False)]
    one, two, three = table([TORCH, ROW, *other]).split("\n\n")
    assert "float32" in one and "custom_ar" in one
    assert "int8" in two and "custom_ar" not in two
    assert three.startswith("all_gather, float32, ")
    assert table([]) == ""


def test_an_all_reduce_into_a_new_tensor_is_named_as_such() -> None:
    assert table([replace(ROW, in_place=False)]).startswith("all_reduce sum out of place, float32")


LAYER = OverheadRow(
    backend="custom_ar",
    call="bare",
    flight_records=True,
    pinned=True,
    op="sum",
    dtype="float32",
    bytes=64,
    ranks=2,
    device="cpu",
    iterations=1000,
    time=Spread(390.0, 400.4, 410.0),
    over_bare=Spread(0.0, 0.0, 0.0),
    over_unrecorded=None,
)


def test_the_table_of_overhead_has_a_line_a_layer_and_says_what_has_no_transport() -> None:
    rows = [
        LAYER,
        replace(LAYER, call="all_reduce_", over_bare=Spread(400.0, 501.5, 700.0), over_unrecorded=Spread(10.0, 20.0, 30.0)),
        replace(LAYER, backend="null", call="all_reduce_", ranks=1, over_bare=None, over_unrecorded=Spread(-1.0, 2.0, 3.0)),
        replace(LAYER, call="all_reduce_", flight_records=False, over_bare=Spread(-30.0, -20.0, -1.0)),
        replace(LAYER, call="all_reduce", flight_records=False, over_bare=Spread(-1.0, 9.0, 50.0)),
    ]
    title, *lines, note = overhead_table(rows).splitlines()
    assert title == "all_reduce sum, float32, 64 B, cpu, pinned: median ns a call (more than the native call alone)"
    assert words("\n".join(lines)) == [
        ["custom_ar,", "2", "ranks", "dispatch", "alone*"],
        ["with", "flight", "records"],
        ["native", "call", "alone", "400", "-"],
        ["comm.all_reduce_(x)", "400", "(+502)", "400"],
        ["without", "flight", "records"],
        ["comm.all_reduce_(x)", "400", "(-20)", "-"],
        ["comm.all_reduce(x)", "400", "(noise)", "-"],
        ["what", "flight", "records", "add"],
        ["comm.all_reduce_(x)", "+20", "noise"],
    ]
    assert note.startswith("* no transport")
    assert "no transport" not in overhead_table(rows[:2])
    assert "what flight records add" not in overhead_table(rows[:1])


def test_a_row_of_overhead_is_json() -> None:
    assert json.loads(json.dumps(LAYER.to_json())) == asdict(LAYER)


X86 = """processor : 0
model name : A CPU
cpu MHz : 2596.124
cpu family : 26
model : 2
flags : fpu hypervisor avx2 avx512f

processor : 1
model name : A CPU
cpu MHz : 800.0
"""
ARM = "processor : 0\nBogoMIPS : 50.00\nFeatures : fp asimd bf16\nCPU implementer : 0x41\nCPU part : 0xd40\n"


def test_the_cpu_is_read_from_what_the_kernel_says() -> None:
    assert read_cpu(X86) == {
        "cpu": "A CPU (cpu family 26, model 2)",
        "cpu_mhz": 2596.124,
        "virtual_machine": True,
        "vector_flags": ["avx2", "avx512f"],
    }
    assert read_cpu(ARM) == {
        "cpu": "CPU (cpu implementer 0x41, cpu part 0xd40)",
        "cpu_mhz": None,
        "virtual_machine": False,
        "vector_flags": ["asimd", "bf16"],
    }


def test_caches_are_read_by_level_without_those_for_code(tmp_path: Path) -> None:
    assert read_caches(tmp_path) == {}
    sizes = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M"), ("3", "Unified", "")]
    for i, (level, kind, size) in enumerate(sizes):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", f"0-{i}")):
            (folder / name).write_text(f"{text}\n")
    assert read_caches(tmp_path) == {
        "L1": {"bytes": 49152, "shared_by_cores": "0-0"},
        "L2": {"bytes": 2 << 20, "shared_by_cores": "0-2"},
    }


def test_the_machine_in_words_is_one_line() -> None:
    machine = read_cpu(X86) | {
        "cores": 2,
        "caches": {"L1": {"bytes": 49152}, "L2": {"bytes": 5 << 18}},
        "memory_bytes": 24 << 30,
        "kernel": "Linux 6",
        "python": "3.11.7",
        "torch": "2.13.0",
        "gpus": [],
        "cuda": None,
        "backends": {"torch": {}, "custom_ar": {"isa": "avx512"}},
    }
    assert in_words(machine) == (
        "virtual machine with 2 cores of A CPU (cpu family 26, model 2) at 2.6 GHz, L2 1.25 MiB, memory 24.0 GiB; Linux 6, "
        "Python 3.11.7, torch 2.13.0, custom_ar with isa=avx512"
    )
    assert in_words(machine | {"cpu_mhz": None, "memory_bytes": None, "virtual_machine": False}).startswith(
        "machine with 2 cores"
    )
    on_gpus = in_words(machine | {"gpus": ["NVIDIA H200", "NVIDIA H200"], "cuda": "13.0"})
    assert ", memory 24.0 GiB, 2 x NVIDIA H200; Linux 6, " in on_gpus and "torch 2.13.0, CUDA 13.0, custom_ar" in on_gpus


def test_what_a_layer_adds_is_taken_round_by_round_so_that_a_slow_round_does_not_count() -> None:
    found = difference([1500.0, 9500.0, 1480.0, 1520.0], [1000.0, 9000.0, 1000.0, 1000.0])
    assert found == Spread(495.0, 500.0, 505.0) and not found.noise


def test_without_something_to_compare_with_there_is_no_difference() -> None:
    assert difference([5.0], None) is None
    assert difference([5.0], [4.0]) == Spread(1.0, 1.0, 1.0)


def test_a_difference_that_is_as_often_below_0_as_above_is_noise() -> None:
    assert Spread.of([-3.0, -2.0, 1.0, 2.0]).noise
    assert not Spread.of([0.0, 0.0, 0.0]).noise


@pytest.mark.parametrize(("seconds", "size"), [(0.0, (100, 500)), (1e-6, (20, 500)), (1e-4, (1, 200)), (0.1, (1, 5))], ids=str)
def test_a_block_spreads_the_cost_of_the_clock_and_a_turn_has_several(seconds: float, size: tuple[int, int]) -> None:
    assert turn_size(seconds) == size


def test_a_plot_has_a_panel_a_collective_and_dtype_with_a_line_a_backend_and_way(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="drawing wants the extra commplane[plot]")
    rows = [
        replace(row, collective=collective, dtype=dtype, pinned=pinned, bytes=nbytes)
        for row in (TORCH, ROW)
        for collective in ("all_reduce", "broadcast")
        for dtype in ("float32", "int8")
        for pinned in (True, False)
        for nbytes in (4096, 64)
    ]
    barrier = replace(ROW, collective="barrier", dtype=None, bytes=0)
    drawn: list[dict[str, dict[str, list[float]]]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pyplot,
            "close",
            lambda figure: drawn.append(
                {a.get_title(): {str(line.get_label()): list(line.get_xdata()) for line in a.get_lines()} for a in figure.axes}
            ),
        )
        plot([*rows, barrier], tmp_path / "plot.png")
    ways = ("torch, pinned", "torch, free", "custom_ar staged, pinned", "custom_ar staged, free")
    titles = [f"{c} sum, {d}, 2 ranks, cpu" for c in ("all_reduce", "broadcast") for d in ("float32", "int8")]
    assert drawn == [{title: {way: [64, 4096] for way in ways} for title in titles}]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
