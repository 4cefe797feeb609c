"""What goes wrong while a communicator is tuned: on one rank, on all, in a way, or in the tuner's own data."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch

import commplane
from commplane import errors
from commplane.api import Quantization
from commplane.plugins import PluginHost
from commplane.runtime import Communicator, Plane
from commplane.runtime.tune import Tuner, steps
from commplane.runtime.tune import data as tune_data
from commplane.testing import run_processes, run_threads

pytestmark = pytest.mark.timeout(60)

NORM = {"collective": "all_reduce_rms_norm", "dtype": "float32", "sizes": [512, 1024, 4096], "hidden": 64}


def run(function: Callable[[Plane], Any], plugins: Callable[[], PluginHost] = fused.host) -> list[Any]:
    out = run_threads(2, function, plugins=lambda _rank: plugins(), config=lambda _rank: {"timeout": 20})
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def with_norm(comm: Communicator, norm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, on all ranks: what is wrong from the start gets no communicator."""
    comm.barrier()
    monkeypatch.setattr(fused.Fused, "norm", staticmethod(norm))
    comm.barrier()


def strikes(store: Any, rank: int, world_size: int, call: int, how: str) -> list[str]:
    """Rank 1 does not come to one call of the backend that has the norm whole; what this rank is told, and told again."""
    settings = {"startup_timeout": 2 if how == "stalls" else 300, "run_timeout": 300}
    with commplane.init(store=store, rank=rank, world_size=world_size, plugins=fused.host(), config=settings) as plane:
        tp = plane.communicator("tp")
        total, calls = fused.Fused.total, itertools.count()

        def struck(self: Any, tensor: torch.Tensor) -> torch.Tensor:
            if next(calls) == call and rank == 1:
                if how == "stalls":
                    time.sleep(3600)
                raise RuntimeError("injected")
            return total(self, tensor)

        fused.Fused.total = struck  # type: ignore[method-assign]
        told = []
        for act in (lambda: tp.tune(**NORM), lambda: tp.all_reduce(torch.ones(8))):
            try:
                act()
                told.append("no error")
            except errors.CommplaneError as error:
                told.append(f"{type(error).__name__}: {error}")
        return told


@pytest.mark.parametrize(
    ("call", "how", "wanted"),
    [
        (
            0,
            "raises",
            "tune, a call of fused: failed on some ranks only, which are now out of step: rank 1: RuntimeError: injected",
        ),
        (
            3,
            "raises",
            "tune, a turn of fused: failed on some ranks only, which are now out of step: rank 1: RuntimeError: injected",
        ),
        pytest.param(0, "stalls", "tune, a call of fused did not finish in 4 s", marks=pytest.mark.long),
    ],
)
def test_a_rank_that_does_not_come_to_a_call_ends_the_tuning_of_all_long_before_the_call_would(
    call: int, how: str, wanted: str
) -> None:
    """The waits of the backend, and of start-up where a rank raises, last longer than this test may."""
    outcomes = run_processes(2, strikes, call, how, timeout=50)
    for o in outcomes:
        assert o.error is None and o.returncode == 0, o.output
        tuned, later = o.result
        assert tuned.startswith("CommunicatorError: [tp rank ") and wanted in tuned, tuned
        assert "is poisoned by an earlier fault" in later and "tune, a " in later, later


def test_a_way_that_all_ranks_fail_in_is_out_from_that_size_on_and_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = fused.Fused.total

    def limited(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.nbytes > 512:
            raise RuntimeError("workspace full")
        return total(self, tensor)

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        monkeypatch.setattr(fused.Fused, "total", limited)
        tp.tune(**NORM)
        assert tp.plan.timings is not None
        (curve,) = (c for c in tp.plan.timings.curves if c.candidate == "fused")
        norm, _ = tp.all_reduce_rms_norm(torch.ones(16, 64), torch.zeros(16, 64), torch.ones(64))
        assert torch.allclose(norm, torch.ones(16, 64))
        answer = tp.plan.explain("all_reduce_rms_norm", nbytes=1024)
        return tp.plan.digest, [n for n, _ in curve.points], curve.failed_from, dict(answer.others)["fused (fused)"]

    first, second = run(rank_main)
    assert first == second
    assert first[1:3] == ([512], 1024)
    assert first[3] == "failed when it was tuned: ranks 0, 1: RuntimeError: workspace full"


@pytest.mark.parametrize("step", ["_reduced", "__init__"])
def test_memory_that_ends_for_the_tuners_own_data_ends_the_sizes_and_blames_no_way(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one rank only; the others learn it in the vote. Large sizes and small ones: what was measured is kept."""
    plain = getattr(tune_data.Data, step)

    def scarce(self: Any, *arguments: Any) -> Any:
        size, rank = (arguments[1], arguments[3]) if step == "__init__" else (self.nbytes, self._rank)
        if rank == 1 and size > 8192:
            torch.empty(1 << 60, dtype=torch.uint8)  # raises what torch raises on the CPU
        return plain(self, *arguments)

    monkeypatch.setattr(tune_data.Data, step, scarce)

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        tp.tune("all_reduce", dtype="float32", max_bytes=1 << 15)
        assert tp.plan.timings is not None
        assert tp.all_reduce(torch.ones(1 << 14)).sum().item() == 2 << 14
        return [(c.candidate, [n for n, _ in c.points], c.failed) for c in tp.plan.timings.curves]

    with pytest.warns(
        errors.CommplaneWarning, match="tune ended before the last size at 16384 bytes: rank 1: .*can't allocate memory"
    ):
        assert run(rank_main, PluginHost) == [[("torch", [8192], "")]] * 2


def test_memory_that_ends_at_the_first_size_leaves_the_plan_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def scarce(self: Any, *_: Any) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(tune_data.Data, "__init__", scarce)

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        before = tp.plan.digest
        with pytest.raises(errors.CommunicatorError, match=r"tune measured nothing, so the plan stays .*no memory is left"):
            tp.tune("all_reduce", dtype="float32")
        assert tp.plan.digest == before and tp.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]

    run(rank_main, PluginHost)


def test_a_tuning_after_which_nothing_would_run_leaves_the_plan_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right at the first size and wrong at the next, as the only way."""
    check = tune_data.Data.check

    def wrong(self: Any, got: Any) -> None:
        check(self, got + 1 if self.nbytes > 8192 else got)

    monkeypatch.setattr(tune_data.Data, "check", wrong)

    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        before = tp.plan.digest
        with pytest.raises(errors.CommunicatorError, match="plan stays as it was") as caught:
            tp.tune("all_reduce", dtype="float32", max_bytes=1 << 14)
        assert tp.plan.digest == before and tp.all_reduce(torch.ones(2)).tolist() == [2.0, 2.0]
        return str(caught.value)

    assert all("gave the result wrong at 4096 of 4096 elements" in text for text in run(rank_main, PluginHost))


@pytest.mark.parametrize(
    ("collective", "arguments", "wanted"),
    [
        ("all_reduce_rms_norm", {"hidden": 0}, "wants a hidden size of 1 or more, found 0"),
        ("all_reduce_rms_norm", {"hidden": -4}, "wants a hidden size of 1 or more, found -4"),
        (
            "all_reduce_rms_norm_quant",
            {"op": "fp8_group", "hidden": 100},
            "wants a hidden size that 128 divides for fp8_group group=128, found 100",
        ),
        ("all_reduce_rms_norm_quant", {"op": "nvfp4", "hidden": 8}, "wants a hidden size that 16 divides for nvfp4, found 8"),
    ],
)
def test_a_hidden_size_that_the_call_cannot_have_is_refused_before_any_way_is_blamed(
    collective: str, arguments: dict[str, Any], wanted: str
) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(errors.UnsupportedOperation, match=wanted):
            tp.tune(collective, dtype="bfloat16", sizes=[1024], **arguments)
        x, weight = torch.ones(4, 128, dtype=torch.bfloat16), torch.ones(128, dtype=torch.bfloat16)
        tp.all_reduce_rms_norm_quant(x, x, weight, Quantization("fp8_group"))

    run(rank_main, PluginHost)


def test_a_norm_of_float32_may_be_as_far_off_as_the_kernels_approximate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten places are right, a hundred are not."""

    def off_by(places: int) -> Any:
        def norm(*arguments: Any) -> Any:
            out, new = fused.rms_norm(*arguments)
            return out * (1 + places * torch.finfo(torch.float32).eps), new

        return staticmethod(norm)

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        failed = []
        for places in (10, 100):
            tp.barrier()
            monkeypatch.setattr(fused.Fused, "norm", off_by(places))
            tp.barrier()
            tp.tune(**{**NORM, "sizes": [512]})
            assert tp.plan.timings is not None
            failed.append([c.failed for c in tp.plan.timings.curves if c.candidate == "fused"])
        return failed

    for (right,), (wrong,) in run(rank_main):
        assert right == "" and "gave a wrong norm" in wrong


def test_where_a_rank_that_waits_would_raise_its_own_reason_it_is_let_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 raises a little later than rank 0: both are still in step, and the way is out on both."""
    assert steps._GRACE_S > 0.5

    def late(self: Any, _tensor: Any) -> Any:
        time.sleep(0.3 * self.context.rank)
        raise RuntimeError("no kernel for this")

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        tp.barrier()
        monkeypatch.setattr(fused.Fused, "total", late)
        tp.barrier()
        tp.tune(**NORM)
        return tp.plan.explain("all_reduce_rms_norm", nbytes=512).chosen

    assert run(rank_main) == ["composed of all_reduce by torch and torch"] * 2


def test_what_was_wrong_at_a_size_is_out_though_memory_ends_at_it_for_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where memory ends on one rank for the comparison in which the other finds what is wrong."""
    compare = tune_data.Data._compare

    def scarce(self: Any, got: Any) -> None:
        if self.nbytes > 512 and (not hasattr(got[0], "doubled") or self._rank == 1):
            raise torch.OutOfMemoryError("no memory is left")
        compare(self, got)

    def doubled(*arguments: Any) -> Any:
        norm, new = fused.rms_norm(*arguments)
        norm = norm * 2 if norm.nbytes > 512 else norm
        norm.doubled = True  # type: ignore[attr-defined]
        return norm, new

    monkeypatch.setattr(tune_data.Data, "_compare", scarce)

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        with_norm(tp, doubled, monkeypatch)
        tp.tune(**NORM)
        assert tp.plan.timings is not None
        norm, _ = tp.all_reduce_rms_norm(torch.ones(4, 64), torch.zeros(4, 64), torch.ones(64))
        assert torch.allclose(norm, torch.ones(4, 64))
        return [(c.candidate, [n for n, _ in c.points], c.failed) for c in tp.plan.timings.curves]

    why = "rank 0: gave a wrong norm of 1024 bytes of float32; rank 1: torch.OutOfMemoryError: no memory is left"
    with pytest.warns(errors.CommplaneWarning, match="tune ended before the last size at 1024 bytes: .*no memory is left"):
        first, second = run(rank_main)
    assert first == second == [("composed:torch", [512], ""), ("fused", [], why)]


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda norm: norm.to("meta"), "gave a tensor on meta, wanted cpu"),
        (lambda norm: norm.to_sparse(), "gave what cannot be compared: "),
        (lambda norm: None, r"gave \['NoneType', 'Tensor'\], which is no result of this call"),
    ],
)
def test_a_way_whose_result_cannot_be_compared_is_out_and_the_others_are_measured(
    spoil: Callable[[torch.Tensor], Any], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(*arguments: Any) -> Any:
        norm, new = fused.rms_norm(*arguments)
        return spoil(norm), new

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        with_norm(tp, strange, monkeypatch)
        tp.tune(**NORM)
        assert tp.plan.timings is not None
        return {c.candidate: (len(c.points), c.failed) for c in tp.plan.timings.curves}

    for curves in run(rank_main):
        assert curves["composed:torch"] == (3, "")
        assert curves["fused"][0] == 0 and re.search(f"^ranks 0, 1: {wanted}", curves["fused"][1]), curves


def test_a_call_that_would_be_left_to_nobody_is_named_and_the_plan_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One backend is for small messages, and the only one for large ones gives them wrong."""
    compare = tune_data.Data._compare

    def wrong(self: Any, got: Any) -> None:
        compare(self, got + 1 if self.nbytes > 512 else got)

    monkeypatch.setattr(tune_data.Data, "_compare", wrong)

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        before = tp.plan.digest
        wanted = (
            "tune would leave all_reduce sum of float32, 513 <= bytes, with no way to run, so the plan stays as it was: torch: "
        )
        with pytest.raises(errors.CommunicatorError, match=wanted):
            tp.tune("all_reduce", dtype="float32", sizes=[512, 1024])
        assert tp.plan.digest == before and tp.all_reduce(torch.ones(256)).sum().item() == 512

    run(rank_main, lambda: fused.host(factory="fused:Both", capabilities={"all_reduce"}, max_bytes=512))


def test_no_rank_goes_on_to_a_size_when_the_budget_has_passed_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Tuner.run

    def on_its_clock(self: Any, budget_s: float) -> Any:
        times = itertools.count(step=100 * self._rank)
        self._now = lambda: next(times)
        return measured(self, budget_s)

    monkeypatch.setattr(Tuner, "run", on_its_clock)

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        tp.tune(**NORM, budget_s=150)
        assert tp.plan.timings is not None
        return {tuple(n for n, _ in c.points) for c in tp.plan.timings.curves}

    assert run(rank_main) == [{(512,)}] * 2


def test_what_is_prepared_after_a_tuning_is_for_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the norm of a backend is out, its composition needs an all-reduce."""

    def wrong(*arguments: Any) -> Any:
        norm, new = fused.rms_norm(*arguments)
        return norm * 2, new

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        with_norm(tp, wrong, monkeypatch)
        tp.tune(**NORM)
        requirements = tp._named["fused"].requirements
        requirements.clear()
        tp.prepare("all_reduce_rms_norm", dtype="float32", max_bytes=4096)
        return [str(r.collective) for r in requirements]

    assert run(rank_main) == [["all_reduce_rms_norm", "all_reduce"]] * 2
