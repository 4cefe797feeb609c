"""The file of timings: written, read, compared over the ranks, and left alone where it is of another group."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import fused
import pytest
import torch

from commplane import errors
from commplane.api import Usable, hookimpl
from commplane.cli import main, tune
from commplane.plugins import PluginHost
from commplane.runtime import Plane, follow
from commplane.runtime.follow import facts_of
from commplane.runtime.tuning import Tuning
from commplane.select import Curve, Timings
from commplane.testing import run_threads, without_canary

pytestmark = pytest.mark.timeout(60)

NORM = ("all_reduce_rms_norm", None, "float32", False)
TIMINGS = Timings((Curve(*NORM, "fused", ((512, 50.0),)), Curve(*NORM, "composed:torch", ((512, 5.0),))))


def run(function: Any, config: Any) -> list[Any]:
    return run_threads(2, function, plugins=lambda _rank: fused.host(), config=config)


def written(path: Path, **changes: Any) -> Tuning:
    """A file for this machine, with some facts changed."""

    def rank_main(plane: Plane) -> dict[str, Any]:
        comm = plane.communicator("tp")
        gather = lambda mine: plane.gather(mine, what="facts")  # noqa: E731
        return facts_of(comm.plan, plane.facts, comm.device, plane.config.options, gather)[0]

    facts = run(rank_main, lambda _rank: {"timeout": 20})[0]
    out = Tuning({**facts, **changes}, TIMINGS, str(path))
    out.write(str(path))
    return out


def chosen(plane: Plane) -> tuple[Any, bool]:
    comm = plane.communicator("tp")
    return comm.plan.explain("all_reduce_rms_norm", nbytes=512).chosen, comm.plan.timings is not None


def test_what_is_written_is_read_and_followed_on_every_rank_wherever_it_lies(tmp_path: Path) -> None:
    tuning = written(tmp_path / "0.json")
    assert Tuning.read(str(tmp_path / "0.json")) == tuning
    (tmp_path / "1.json").write_bytes((tmp_path / "0.json").read_bytes())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.json", "1.json"]
    found = run(chosen, lambda rank: {"timeout": 20, "tuning": tmp_path / f"{rank}.json"})
    assert found == [("composed of all_reduce by torch and torch", True)] * 2


def test_a_file_of_another_group_is_not_used_and_says_so_once(tmp_path: Path) -> None:
    written(tmp_path / "t.json", ranks=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(chosen, lambda _rank: {"timeout": 20, "tuning": str(tmp_path / "t.json")})
    assert found == [("fused", False)] * 2
    texts = [str(w.message) for w in caught if "tuning file" in str(w.message)]
    assert len(texts) == 1 and "ranks was 8, here it is 2; write one with commplane tune" in texts[0]


def followed(path: Path, config: dict[str, Any] | None = None, **spec: Any) -> tuple[list[Any], list[str]]:
    """What two ranks choose with the file, and what they are told of it."""

    def settings(_rank: int) -> dict[str, Any]:
        return {"timeout": 20, "tuning": str(path), **(config or {})}

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run_threads(2, chosen, plugins=lambda _rank: fused.host(**spec), config=settings)
    return found, [str(w.message) for w in caught if "tuning file" in str(w.message)]


def test_a_file_that_fits_some_ranks_only_is_used_by_none_and_the_notice_names_rank_and_fact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "t.json", device="NVIDIA H100")
    names = iter(["NVIDIA H100", "NVIDIA H200"])
    monkeypatch.setattr(follow, "device_name", lambda _device, _machine: next(names))
    found, texts = followed(tmp_path / "t.json")
    assert found == [("fused", False)] * 2
    (text,) = texts
    assert re.search(r": on rank [01] device was 'NVIDIA H100', here it is 'NVIDIA H200'; write one", text)


def test_a_fact_that_the_file_leaves_out_may_be_anything(tmp_path: Path) -> None:
    Tuning({"ranks": 2}, TIMINGS).write(str(tmp_path / "t.json"))
    found, texts = followed(tmp_path / "t.json")
    assert found == [("composed of all_reduce by torch and torch", True)] * 2 and not texts


@pytest.mark.parametrize(
    ("config", "spec", "fact"),
    [
        ({"fused": {"algorithm": "two_shot"}}, {}, "backends.fused.options.algorithm was 'auto', here it is 'two_shot'"),
        ({}, {"probe": "test_tune_file:other_kernels"}, "backends.fused.found.kernels was '1.0', here it is '2.0'"),
    ],
)
def test_other_options_and_another_version_of_what_a_backend_stands_on_are_another_group(
    tmp_path: Path, config: dict[str, Any], spec: dict[str, Any], fact: str
) -> None:
    same = {"options": {"algorithm": "auto"}, "probe": "test_tune_file:kernels"}
    backend = {"dist": "fused-wheel 1.0", "found": {"kernels": "1.0"}, "options": {"algorithm": "auto"}}
    path = tmp_path / "t.json"
    Tuning({"backends": {**written(path).facts["backends"], "fused": backend}}, TIMINGS).write(str(path))
    assert followed(path, **same)[0] == [("composed of all_reduce by torch and torch", True)] * 2
    found, (text,) = followed(path, config, **{**same, **spec})
    assert found == [("fused", False)] * 2 and fact in text


def kernels(_request: Any, _facts: Any) -> Usable:
    return Usable({"kernels": "1.0"})


def other_kernels(_request: Any, _facts: Any) -> Usable:
    return Usable({"kernels": "2.0"})


def explained(plane: Plane) -> str:
    comm = plane.communicator("tp", device="cuda:0")
    return str(comm.plan.explain("all_reduce_rms_norm", nbytes=1 << 24, dtype="bfloat16"))


@pytest.fixture
def two_h200(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs ranks whose GPUs are called so, with a backend of the name of one that the shipped file has times of."""
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(follow, "device_name", lambda _device, _machine: "NVIDIA H200")
    spec = {
        "name": "custom_ar",
        "device": "any",
        "factory": "fused:Both",
        "capabilities": {"all_reduce", "all_reduce_rms_norm"},
        "options": {"algorithm": "auto"},
    }

    def go(*plugins: Any, ranks: int = 2, gpus: int = 2, **config: Any) -> list[Any]:
        which = itertools.count()
        monkeypatch.setattr(follow, "device_id", lambda _device: f"GPU-{next(which) % gpus}")

        def host(_rank: int) -> PluginHost:
            out = fused.host(**spec)
            for plugin in plugins:
                out.register(plugin, "site", dist="site-wheel", version="1.0")
            return out

        with without_canary():
            return run_threads(ranks, explained, plugins=host, config=lambda _rank: {"timeout": 20, **config})

    return go


def test_two_h200_follow_what_is_shipped_and_explain_shows_the_fused_call_the_pairs_and_the_file(two_h200: Any) -> None:
    first, second = two_h200()
    assert first == second
    lines = first.splitlines()
    assert lines[0].endswith("custom_ar, 53.6 us (hidden 4096, commplane/tunings/nvidia-h200-x2.json)")
    assert "  not composed of all_reduce by custom_ar and torch: 71.3 us at 16777216 bytes, custom_ar takes 53.6" in lines


@pytest.mark.parametrize(
    "config",
    [
        {"tuning": "off"},
        {"tuning": ""},
        {"backends": ["custom_ar"]},
        {"gpus": 1},
        {"custom_ar": {"algorithm": "two_shot"}},
    ],
)
def test_nothing_shipped_is_followed_with_the_setting_off_or_an_order_or_other_options_given_or_on_one_gpu_for_all(
    two_h200: Any, config: dict[str, Any]
) -> None:
    first, second = two_h200(**config)
    assert first == second and "custom_ar" in first.splitlines()[0]
    assert " us" not in first


class Site:
    """Gives an order, as a site's policy."""

    @hookimpl
    def commplane_select_backend(self, request: Any, candidates: Any) -> list[str]:
        return list(candidates)


def test_nothing_shipped_is_followed_where_a_policy_gave_the_order(two_h200: Any) -> None:
    first, second = two_h200(Site())
    assert first == second and "custom_ar" in first.splitlines()[0]
    assert " us" not in first


def test_a_group_of_as_many_ranks_as_no_shipped_file_has_asks_nobody(two_h200: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "facts_of", lambda *_arguments: pytest.fail("asked"))
    assert all(" us" not in text for text in two_h200(ranks=4, gpus=4))


def test_a_file_that_would_leave_a_call_to_nobody_is_not_used_and_says_so_once(tmp_path: Path) -> None:
    """Measured where every class of numerics was admitted: what was right there is not admitted here."""
    path = tmp_path / "t.json"
    broken, right = Curve(*NORM, "fused", failed="gave a wrong norm"), Curve(*NORM, "composed:torch", ((512, 5.0),))
    Tuning({"ranks": 2}, Timings((broken, right))).write(str(path))
    spec = {"numerics": "rank_order"}
    assert followed(path, **spec)[0] == [("composed of all_reduce by torch and torch", True)] * 2
    found, (text,) = followed(path, {"numerics": "rank_order"}, **spec)
    assert found == [("fused", False)] * 2
    assert "not used by communicator" in text
    assert ": it leaves all_reduce_rms_norm of float32, 0 <= bytes, with no way to run; write one with commplane tune" in text


def test_files_that_differ_stop_every_rank(tmp_path: Path) -> None:
    tuning = written(tmp_path / "0.json")
    replace(tuning, timings=Timings(TIMINGS.curves[:1])).write(str(tmp_path / "1.json"))
    found = run(chosen, lambda rank: {"timeout": 20, "tuning": str(tmp_path / f"{rank}.json")})
    assert all(
        isinstance(e, errors.AgreementError) and "ranks disagree on settings" in str(e) and "tuning=" in str(e) for e in found
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "cannot be read"),
        ("{", "is not valid JSON"),
        ("[]", "wants version 2 and facts"),
        (json.dumps({"version": 2, "facts": {}, "timings": [{"collective": "all_reduce"}]}), "is broken: a curve wants"),
    ],
)
def test_a_broken_file_is_a_configuration_error(tmp_path: Path, text: str | None, wanted: str) -> None:
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(errors.ConfigError, match=wanted):
        Tuning.read(str(path))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--out", "no/such/folder/t.json"], "wanted a file in a folder that can be written to, found 'no/such/folder/t.json'"),
        (["--out", "."], "wanted a file in a folder that can be written to, found '.'"),
        (["--op", "sum"], "invalid choice: 'sum'"),
        (
            ["--op", "fp8_token"],
            "wants all_reduce_rms_norm_quant among --collectives, found all_reduce, all_reduce_rms_norm: leave",
        ),
    ],
)
def test_what_the_command_could_not_do_at_its_end_is_refused_before_it_measures(
    arguments: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "in_ranks", lambda _options: pytest.fail("started"))
    try:
        code = main(["tune", *arguments])
    except SystemExit as error:
        code = error.code
    assert code in (1, 2)
    assert wanted in capsys.readouterr().err


def test_the_command_writes_a_file_that_the_next_run_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.json"
    monkeypatch.setenv("COMMPLANE_BACKENDS", "torch")
    sizes = ["--sizes", "8K", "--hidden", "256", "--dtypes", "fp32", "--device", "cpu"]
    assert main(["tune", "--collectives", "all_reduce_rms_norm", *sizes, "--out", str(path)]) == 0
    tuning = Tuning.read(str(path))
    assert [c.candidate for c in tuning.timings.curves] == ["composed:torch"]
    assert (tuning.facts["ranks"], tuning.facts["gpus"]) == (2, 0)
    monkeypatch.setenv("COMMPLANE_TUNING", str(path))
    monkeypatch.setenv("COMMPLANE_DEVICE", "cpu")
    capfd.readouterr()
    assert main(["explain", "all_reduce_rms_norm", "--bytes", "8K"]) == 0
    assert "composed of all_reduce by torch and torch, " in capfd.readouterr().out
