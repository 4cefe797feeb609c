"""tools/gpu_results.py: what it runs for how many GPUs, and what it says of the figures."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commplane.runtime.tuning import Tuning

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "gpu_results.py"
tool = runpy.run_path(str(TOOL))
verdict = runpy.run_path(str(ROOT / "tools" / "gpu_verdict.py"))["verdict"]
made = runpy.run_path(str(ROOT / "tools" / "tunings.py"))["made"]
MIB = 1 << 20


def words(arguments: list[str], option: str) -> list[str]:
    """The list that an option has."""
    return arguments[arguments.index(option) + 1].split(",")


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_one_command_has_every_comparison_that_the_machine_allows(ranks: int, shared: bool) -> None:
    made = tool["benches"](ranks, shared)
    stem = "one-gpu" if shared else "cuda"
    ways = ["graph", "eager"] + (["groups"] if ranks >= 4 else [])
    assert list(made) == [f"{stem}-{ranks}-{way}.json" for way in ways]
    for name, arguments in made.items():
        assert words(arguments, "--collectives") == ["all_reduce", "all_reduce_rms_norm"]
        assert {"custom_ar", "flashinfer:one_shot", "flashinfer:two_shot"} <= set(words(arguments, "--backends"))
        backends = words(arguments, "--backends")
        assert ("torch_symm:two_shot" in backends) is not shared  # which takes no two ranks on one GPU
        assert ("custom_ar:two_shot_push" in backends) is not shared
        assert ("64M" in words(arguments, "--sizes")) is not shared
        assert ("--graph" in arguments) is ("eager" not in name)
        assert words(arguments, "--ranks") == [str(ranks)]
        assert ("--groups" in arguments) is ("groups" in name)
        assert words(arguments, "--json") == [f"docs/results/{name}"]


def row(backend: str, nbytes: int, us: float, mode: str = "staged", **changes: Any) -> dict[str, Any]:
    found = {"collective": "all_reduce", "graph": True, "groups": 1, "ranks": 4, "backend": backend, "mode": mode}
    return found | {"bytes": nbytes, "median_us": us} | changes


def test_it_says_where_we_are_the_fastest_and_where_not() -> None:
    rows = [row("custom_ar", MIB, 5.0), row("torch", MIB, 9.0), row("flashinfer:one_shot", MIB, 6.0)]
    rows += [row("custom_ar", 4 * MIB, 12.0), row("torch", 4 * MIB, 20.0), row("torch_symm:two_shot", 4 * MIB, 10.0)]
    rows += [row("custom_ar", 64 * MIB, 99.0), row("torch", 64 * MIB, 100.0), row("flashinfer", 64 * MIB, 50.0)]
    ordinary, above, *_ = verdict(rows)
    assert ordinary == (
        "all_reduce, 4 ranks, in graphs, ordinary tensors: the fastest up to 8 MiB at 1 of 2 sizes; "
        "not at 4194304 bytes (12.00 us, torch_symm:two_shot staged 10.00, 1.20)"
    )
    assert above == "all_reduce, 4 ranks, in graphs, ordinary tensors: not slower than NCCL above at 1 of 1 sizes"


def test_a_tensor_in_symmetric_memory_is_compared_where_each_side_may_have_one() -> None:
    rows = [row("custom_ar", MIB, 5.0), row("torch", MIB, 9.0), row("torch_symm:two_shot", MIB, 4.0, "symmetric")]
    ordinary, anything = verdict(rows)
    assert ordinary.endswith("ordinary tensors: the fastest up to 8 MiB at 1 of 1 sizes")
    assert "any memory: the fastest up to 8 MiB at 0 of 1 sizes; not at 1048576 bytes (5.00 us" in anything
    rows.append(row("custom_ar", MIB, 3.0, "symmetric"))
    assert verdict(rows)[1].endswith("any memory: the fastest up to 8 MiB at 1 of 1 sizes")


def test_it_says_from_where_on_the_two_shot_is_the_faster_one_and_counts_neither_as_a_rival() -> None:
    rows = [row("custom_ar", MIB, 5.0), row("torch", MIB, 9.0)]
    for nbytes, one, two in (
        (MIB // 2, 3.0, 4.0),
        (MIB, 5.0, 4.5),
        (2 * MIB, 9.0, 9.0),
        (4 * MIB, 19.0, 12.0),
        (8 * MIB, 40.0, 20.0),
    ):
        rows += [row("custom_ar:one_shot_push", nbytes, one), row("custom_ar:two_shot_push", nbytes, two)]
    ordinary, _, crossing = verdict(rows)
    assert ordinary.endswith("at 1 of 1 sizes")
    assert crossing == "all_reduce, 4 ranks, in graphs: two_shot_push is faster than one_shot_push from 4194304 bytes up"
    assert verdict(rows[:4])[-1].endswith("at no size that was measured")


def test_a_size_that_it_does_not_serve_is_named() -> None:
    rows = [row("custom_ar", 16 * MIB, 5.0), row("torch", 16 * MIB, 9.0), row("torch", 64 * MIB, 30.0)]
    assert verdict(rows)[0].endswith("not slower than NCCL above at 1 of 1 sizes; custom_ar does not serve 67108864 bytes")
    assert "at 0 of 0 sizes; custom_ar does not serve 67108864 bytes" in verdict(rows[2:])[0]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_timings_that_are_shipped_can_be_made_of_what_the_benches_write(tmp_path: Path, ranks: int) -> None:
    """Of rows as four ranks on one GPU gave them, with everything that a machine of GPUs has besides."""
    paths = []
    for way, name in (("graph", "one-gpu-4-graph.json"), ("eager", "one-gpu-4-eager.json")):
        result = json.loads((ROOT / "docs" / "results" / name).read_text())
        more = {"gpus": ["NVIDIA H200"] * ranks, "mps_share_percent": None, "ranks": ranks}
        asked = words(tool["benches"](ranks, shared=False)[f"cuda-{ranks}-{way}.json"], "--backends")
        like = [r for r in result["rows"] if r["backend"] == "flashinfer"]
        rows = [{**r, "ranks": ranks, "backend": name} for name in ["torch", *asked] for r in like]
        paths.append(tmp_path / f"{way}.json")
        paths[-1].write_text(json.dumps({"machine": result["machine"] | more, "rows": rows}))
    tuning = Tuning.parse(made(paths), "x", "x")
    assert tuning.facts == {"device": "NVIDIA H200", "ranks": ranks, "hosts": [ranks], "gpus": ranks}
    curves = tuning.timings.curves
    assert {(c.graph, c.candidate) for c in curves if c.collective == "all_reduce"} == {
        (graph, name) for graph in (False, True) for name in ("torch", "custom_ar", "flashinfer")
    }
    norms = [c for c in curves if c.collective == "all_reduce_rms_norm"]
    assert {c.hidden for c in norms} == {4096} and len(norms) == 12  # whole and composed, in graphs and not


def test_calls_of_different_kinds_are_not_mixed() -> None:
    rows = [row("custom_ar", MIB, 5.0), row("torch", MIB, 9.0)]
    rows += [row("custom_ar", MIB, 50.0, graph=False), row("torch", MIB, 40.0, graph=False)]
    rows += [row("custom_ar", MIB, 1.0, groups=2, ranks=2), row("torch", MIB, 2.0, groups=2, ranks=2)]
    said = [line for line in verdict(rows) if "ordinary" in line]
    assert [line.partition(", ordinary")[0] for line in said] == [
        "all_reduce, 4 ranks, in graphs",
        "all_reduce, 4 ranks, eager",
        "all_reduce, 2 groups of 2 ranks, in graphs",
    ]
    assert ["at 1 of 1" in line for line in said] == [True, False, True]


def test_nothing_is_claimed_without_somebody_to_compare_with() -> None:
    assert verdict([row("custom_ar", MIB, 5.0)]) == []
    alone = verdict([row("torch", MIB, 5.0)])
    assert alone and all("at 0 of 0 sizes; custom_ar does not serve 1048576 bytes" in line for line in alone)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--ranks", "64"], 1, "wanted 64 GPUs, found"),
        (["dcotor"], 2, "wanted some of doctor, kit, graph, eager, groups, tunings or bench, found dcotor"),
    ],
)
def test_a_machine_without_the_gpus_and_a_wrong_part_are_said_at_once(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
