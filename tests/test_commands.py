"""The commands, as a user runs them: real ranks through torchrun, plugins found by entry point."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROW_KEYS = {
    "collective", "op", "backend", "mode", "in_place", "pinned", "dtype", "bytes", "hidden", "ranks", "device", "graph",
    "median_us", "p99_us", "iterations", "vs_torch", "vs_pair", "detail", "algorithm", "groups",
}  # fmt: skip
MACHINE_KEYS = {
    "cpu", "cpu_mhz", "virtual_machine", "vector_flags", "instruction_set", "cores", "cores_of_machine", "caches",
    "memory_bytes", "kernel", "python", "torch", "omp_num_threads", "gpus", "cuda", "wheels", "backends", "settings",
    "mps_share_percent", "ranks", "hosts", "load_before", "date", "command",
}  # fmt: skip


def test_doctor_shows_plugins_facts_and_the_plan_as_text_and_as_json(commplane: Any) -> None:
    text = commplane("doctor", "--ranks", "2")
    assert text.returncode == 0, text.stderr
    for words in ("custom_ar", "torch", "shared memory: ranks 0, 1 on", "all_reduce", "settings", "all defaults"):
        assert words in text.stdout
    report = json.loads(commplane("doctor", "--ranks", "3", "--json").stdout)
    assert report["world_size"] == 3 and report["hosts"] == [[0, 1, 2]]
    assert [c["name"] for c in report["plan"]["candidates"]] == ["custom_ar", "torch", "flashinfer", "hierarchical", "torch_symm"]
    assert [c["state"] for c in report["plan"]["candidates"]] == ["ready", "ready", "probe", "probe", "probe"]
    assert [f["rank"] for f in report["facts"]] == [0, 1, 2]


def test_explain_answers_for_one_call(commplane: Any) -> None:
    out = commplane("explain", "all_reduce", "--bytes", "8192", "--dtype", "bf16")
    assert out.returncode == 0 and "all_reduce(sum, bfloat16, 8192 bytes)" in out.stdout and ": custom_ar" in out.stdout
    answer = json.loads(commplane("explain", "all_gather", "--dtype", "int64", "--json").stdout)
    assert answer["chosen"] == "custom_ar"
    absent = dict.fromkeys(("flashinfer", "torch_symm"), "probe: serves cuda, the group is on cpu")
    few = {"hierarchical": "probe: serves groups of 3 ranks or more, this one has 2"}
    assert answer["others"] == {"torch": "custom_ar comes before it", **absent, **few}
    composed = commplane("explain", "all_reduce_rms_norm", "--json", env={"COMMPLANE_BACKENDS": "torch"})
    answer = json.loads(composed.stdout)
    assert answer["chosen"].startswith("composed of") and answer["others"]["torch"] == "does not declare all_reduce_rms_norm"
    nothing = commplane("explain", "all_reduce", "--dtype", "int16")
    assert nothing.returncode == 3 and "nothing in the plan serves this" in nothing.stdout


def test_bench_writes_the_machine_and_rows_with_the_agreed_keys_and_a_picture(commplane: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing wants the extra commplane[plot]")
    arguments = ["--sizes", "64,8K", "--dtypes", "f32", "--rounds", "2", "--pin", "both", "--json", "b.json", "--plot", "b.png"]
    out = commplane("bench", "--ranks", "2", *arguments)
    assert out.returncode == 0, out.stderr
    assert "[2/2] all_reduce sum float32 8192 bytes" in out.stderr  # progress
    answer = json.loads((tmp_path / "b.json").read_text())
    assert answer.keys() == {"machine", "rows"}
    rows, machine = answer["rows"], answer["machine"]
    assert machine.keys() == MACHINE_KEYS
    assert machine["command"] == f"commplane bench --ranks 2 {' '.join(arguments)}" and machine["ranks"] == 2
    assert machine["wheels"].keys() >= {"commplane", "commplane-custom-ar"} and machine["backends"]["custom_ar"]["isa"]
    assert machine["cpu"] in out.stdout
    assert all(set(row) == ROW_KEYS for row in rows)
    assert sorted((r["backend"], r["mode"], r["pinned"], r["bytes"]) for r in rows) == sorted(
        (backend, mode, pinned, nbytes)
        for backend, mode in (("torch", "staged"), ("custom_ar", "staged"), ("custom_ar", "symmetric"))
        for pinned in (True, False)
        for nbytes in (64, 8192)
    )
    assert all(0 < r["median_us"] <= r["p99_us"] for r in rows)
    for nbytes in (64, 8192):
        best = min(r["median_us"] for r in rows if r["backend"] == "torch" and r["bytes"] == nbytes)
        for r in rows:
            if r["bytes"] == nbytes:
                assert r["vs_torch"] == pytest.approx(best / r["median_us"], abs=0.01)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_measures_every_collective_also_with_more_ranks_than_cores(commplane: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing wants the extra commplane[plot]")
    ranks = len(os.sched_getaffinity(0)) + 1
    collectives = ["all_gather", "reduce_scatter", "broadcast", "all_reduce_rms_norm", "barrier"]
    arguments = ["--sizes", "256", "--hidden", "32", "--rounds", "1", "--quiet", "--json", "b.json", "--plot", "b.png"]
    out = commplane("bench", "--ranks", str(ranks), "--collectives", ",".join(collectives), *arguments)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert list(dict.fromkeys(r["collective"] for r in rows)) == collectives
    assert {r["pinned"] for r in rows} == {False}  # ranks that share a core are measured as they come
    assert {r["backend"] for r in rows if r["collective"] == "barrier"} == {"torch", "custom_ar"}
    fused = [r for r in rows if r["collective"] == "all_reduce_rms_norm"]
    assert {(r["dtype"], r["mode"]) for r in fused if r["backend"] == "torch"} == {("float32", "pair"), ("bfloat16", "pair")}
    assert {r["hidden"] for r in fused} == {32} and all(r["vs_pair"] for r in fused if r["mode"].startswith("fused"))
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_bench_shows_what_each_layer_of_a_call_costs(commplane: Any, tmp_path: Path) -> None:
    out = commplane("bench", "--overhead", "--rounds", "2", "--json", "o.json")
    assert out.returncode == 0, out.stderr
    assert "round of" in out.stderr
    answer = json.loads((tmp_path / "o.json").read_text())
    assert answer["machine"].keys() == MACHINE_KEYS
    rows = answer["rows"]
    calls = {"bare", "all_reduce_", "all_reduce", "ops.all_reduce_", "ops.all_reduce"}
    layers = {(r["backend"], r["flight_records"], r["call"]) for r in rows}
    for backend in ("torch", "null"):
        assert {(backend, on, call) for on in (True, False) for call in calls} <= layers
    # Where a backend has no native call of its own, that one line is missing.
    assert {("custom_ar", on, call) for on in (True, False) for call in calls - {"bare"}} <= layers
    assert {r["ranks"] for r in rows if r["backend"] == "null"} == {1}
    assert {(r["bytes"], r["dtype"], r["op"]) for r in rows} == {(64, "float32", "sum")}
    assert all((r["over_unrecorded"] is None) is not r["flight_records"] for r in rows)
    for words in ("native call alone", "comm.all_reduce_(x)", "with flight records", "without flight records", "no transport"):
        assert words in out.stdout


def test_bench_without_a_plot_needs_no_matplotlib_and_no_times_that_the_settings_name(commplane: Any, tmp_path: Path) -> None:
    hidden = tmp_path / "hide" / "matplotlib"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('hidden by the test')")
    env = {"PYTHONPATH": str(hidden.parent)}
    out = commplane("bench", "--plot", "b.png", env=env)
    assert out.returncode == 1 and "--plot wants matplotlib" in out.stderr and "commplane[plot]" in out.stderr
    env["COMMPLANE_TUNING"] = str(tmp_path / "nosuch.json")  # what is measured is each backend, not what is the fastest of them
    out = commplane("bench", "--sizes", "64", "--dtypes", "f32", "--rounds", "1", "--quiet", env=env)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(
    ("arguments", "env", "words"),
    [
        (["doctor"], {"COMMPLANE_TIMOUT": "3"}, "did you mean 'COMMPLANE_TIMEOUT'?"),
        (["doctor"], {"COMMPLANE_TIMEOUT": "soon"}, "wanted a number of seconds above 0, found 'soon'"),
        (["doctor"], {"COMMPLANE_BACKENDS": "custom_are"}, "did you mean 'custom_ar'?"),
        (["bench", "--backends", "nosuch"], {}, "no installed wheel provides backend 'nosuch'"),
        (["bench", "--dtypes", "flot"], {}, "torch has no dtype flot"),
        (["bench", "--json", "no/such/folder.json"], {}, "folder of 'no/such/folder.json' does not exist"),
        (["bench", "--overhead", "--plot", "b.png"], {}, "found --plot: leave it out"),
        (["bench", "--overhead", "--dtypes", "flot"], {}, "torch has no dtype flot"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(commplane: Any, arguments: list[str], env: dict[str, str], words: str) -> None:
    out = commplane(*arguments, env=env)
    assert out.returncode == 1 and words in out.stderr, out.stderr
    assert "Traceback" not in out.stderr and out.stderr.count(words) == 1, out.stderr


def test_wrong_usage_is_exit_code_2(commplane: Any) -> None:
    assert commplane("explain", "all_reduced").returncode == 2
    assert commplane("bench", "--sizes", "many").returncode == 2
    assert commplane().returncode == 2


def test_run_starts_a_script_with_its_arguments_and_gives_its_exit_code(commplane: Any, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import sys, torch, commplane\n"
        "with commplane.init() as plane:\n"
        "    tp = plane.communicator('tp')\n"
        "    total = tp.all_reduce(torch.ones(1)).item()\n"
        "    if tp.rank == 0:\n"
        "        print('sum', total, 'on', tp.plan.backends, 'with', sys.argv[1:], flush=True)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    good = commplane("run", "--ranks", "2", "script.py", "0", "--flag")
    assert good.returncode == 0, good.stderr
    assert "sum 2.0 on ('custom_ar', 'torch') with ['0', '--flag']" in good.stdout
    assert commplane("run", "--ranks", "2", "script.py", "7").returncode != 0


def test_the_backend_is_swapped_by_configuration_alone(commplane: Any, tmp_path: Path) -> None:
    def chosen(**env: str) -> str:
        out = commplane("explain", "--json", env=env)
        assert out.returncode == 0, out.stderr
        return str(json.loads(out.stdout)["chosen"])

    assert chosen() == "custom_ar"
    assert chosen(COMMPLANE_BACKENDS="torch") == "torch"
    assert chosen(COMMPLANE_PLUGINS="-custom_ar") == "torch"
    settings = tmp_path / "settings.toml"
    settings.write_text('backends = ["torch"]\n\n[custom_ar]\nchunk_bytes = 8192\n')
    assert chosen(COMMPLANE_CONFIG=str(settings)) == "torch"
    assert chosen(COMMPLANE_CONFIG=str(settings), COMMPLANE_BACKENDS="custom_ar") == "custom_ar"


def fake_wheel(folder: Path, name: str, code: str, requires: str = "") -> None:
    """An installed distribution with an entry point, by hand."""
    module = f"fake_{name}"
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    extra = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n{extra}")
    (info / "entry_points.txt").write_text(f"[commplane.plugins]\n{name} = {module}\n")


SPEC = """
from commplane.api import BackendSpec, hookimpl
@hookimpl
def commplane_register_comm_backends():
    return [BackendSpec(name={name!r}, api={api}, factory="a:b", probe="a:b", capabilities=set(), dtypes=set(), device="cpu")]
"""


@pytest.mark.parametrize(
    ("name", "code", "requires", "words"),
    [
        ("broken", "import libcudart_is_missing", "", "failed to load"),
        pytest.param("old", SPEC.format(name="old", api=(2, 0)), "", "comm API 2.0", marks=pytest.mark.long),
        pytest.param("picky", SPEC.format(name="picky", api=(1, 0)), "commplane>=7", "commplane>=7", marks=pytest.mark.long),
        pytest.param(
            "custom_ar",
            SPEC.format(name="custom_ar", api=(1, 0)),
            "",
            "2 distributions provide plugin 'custom_ar'",
            marks=pytest.mark.long,
        ),
        ("rival", SPEC.format(name="custom_ar", api=(1, 0)), "", "two distributions provide backend 'custom_ar'"),
    ],
)
def test_a_bad_wheel_is_reported_and_stops_nobody(
    commplane: Any, tmp_path: Path, name: str, code: str, requires: str, words: str
) -> None:
    fake_wheel(tmp_path / "site", name, code, requires)
    env = {"PYTHONPATH": str(tmp_path / "site")}
    plugins = commplane("plugins", env=env)
    assert plugins.returncode == 3 and words in plugins.stdout, plugins.stdout
    doctor = commplane("doctor", "--json", env=env)
    assert doctor.returncode == 3, doctor.stderr
    report = json.loads(doctor.stdout)
    assert any(words in json.dumps(p) for p in report["plugins"]["problems"])
    ready = [c["name"] for c in report["plan"]["candidates"] if c["state"] == "ready"]
    # A name that two claim is nobody's; every other backend works as before.
    assert ready == (["torch"] if name in ("custom_ar", "rival") else ["custom_ar", "torch"])
    asked = commplane("explain", env={**env, "COMMPLANE_BACKENDS": "custom_ar" if name == "rival" else name})
    assert asked.returncode == 1 and words in asked.stderr, asked.stderr
