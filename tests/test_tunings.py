"""The timings that core ships are those of docs/results; the tool refuses what does not belong together."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from commplane.runtime.tuning import Tuning, shipped
from commplane.select import Curve, Timings

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
SHIPPED = ROOT / "packages" / "core" / "src" / "commplane" / "tunings"
made = runpy.run_path(str(ROOT / "tools" / "tunings.py"))["made"]


def test_each_shipped_file_is_what_the_tool_makes_of_the_results() -> None:
    names = sorted(p.name for p in SHIPPED.iterdir())
    assert "nvidia-h200-x2.json" in names
    for name in names:
        text = (SHIPPED / name).read_text()
        sources = json.loads(text)["made_of"]
        again = (
            f"python tools/tunings.py {' '.join(f'docs/results/{s}' for s in sources)} --out {SHIPPED.relative_to(ROOT) / name}"
        )
        assert text == made([RESULTS / source for source in sources]), f"make it again: {again}"


def test_what_is_shipped_is_read_and_is_of_one_host_of_gpus() -> None:
    every = shipped()
    assert len(every) == len(list(SHIPPED.iterdir()))
    for one in every:
        assert one.facts["gpus"] == one.facts["ranks"] and one.facts["hosts"] == [one.facts["ranks"]]
    (tuning,) = (one for one in every if one.facts["ranks"] == 2)
    assert tuning.facts == {"device": "NVIDIA H200", "ranks": 2, "hosts": [2], "gpus": 2}
    assert {c.candidate for c in tuning.timings.curves} == {"custom_ar", "torch", "composed:custom_ar", "composed:torch"}


def tuned(path: Path, **changes: Any) -> Path:
    """A file as the command tune writes it."""
    facts = {"device": "NVIDIA H200", "ranks": 2, "hosts": [2], "gpus": 2, "torch": "2.11.0", **changes}
    curve = Curve("all_reduce_rms_norm", None, "bfloat16", True, "flashinfer", ((8192, 3.0),), hidden=4096)
    broken = Curve("all_reduce", "sum", "float16", True, "flashinfer", failed="rank 0: gave the result wrong")
    Tuning(facts, Timings((curve, broken))).write(str(path))
    return path


def test_what_tune_measured_takes_the_place_of_that_call(tmp_path: Path) -> None:
    text = made([RESULTS / "cuda-graph.json", RESULTS / "cuda-fused.json", tuned(tmp_path / "t.json")])
    curves = Tuning.parse(text, "x", "x").timings.curves
    assert [(c.collective, c.candidate) for c in curves] == [
        ("all_reduce", "custom_ar"),
        ("all_reduce", "torch"),
        ("all_reduce_rms_norm", "flashinfer"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "NVIDIA H100"},
        {"ranks": 4, "hosts": [4], "gpus": 4},
        {"hosts": [1, 1]},
        {"device": "cpu x86_64"},
        {"gpus": 1},
        {"gpus": None},
    ],
)
def test_times_of_another_machine_are_not_mixed_in(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        made([RESULTS / "cuda-graph.json", tuned(tmp_path / "t.json", **changes)])


def test_times_of_groups_side_by_side_are_refused(tmp_path: Path) -> None:
    result = json.loads((RESULTS / "cuda-fused.json").read_text())
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({**result, "rows": [{**row, "groups": 2} for row in result["rows"]]}))
    with pytest.raises(ValueError, match="wanted rows of one group that has the machine to itself, found groups side by side"):
        made([path])


@pytest.mark.parametrize("changes", [{"gpus": ["NVIDIA H200"]}, {"mps_share_percent": 50.0}])
def test_times_of_ranks_that_shared_a_gpu_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = json.loads((RESULTS / "cuda-fused.json").read_text())
    path = tmp_path / "one-gpu.json"
    path.write_text(json.dumps({**result, "machine": {**result["machine"], **changes}}))
    with pytest.raises(ValueError, match="wanted a GPU for each rank"):
        made([path])
