"""`Communicator.tune`: every way is verified, timed and agreed on; threads as ranks, no time is asserted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch

from commplane import errors
from commplane.plugins import PluginHost
from commplane.runtime import Plane
from commplane.runtime.tune import measure, subject_of
from commplane.runtime.tune.data import Data, Wrong
from commplane.testing import run_threads

pytestmark = pytest.mark.timeout(60)

SIZES = [512, 1024, 4096]
NORM = {"collective": "all_reduce_rms_norm", "dtype": "float32", "sizes": SIZES, "hidden": 64}


def run(function: Callable[[Plane], Any], plugins: Callable[[], PluginHost] = fused.host) -> list[Any]:
    out = run_threads(2, function, plugins=lambda _rank: plugins(), config=lambda _rank: {"timeout": 20})
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def test_whole_and_composed_ways_are_measured_and_every_rank_has_the_same_plan() -> None:
    def rank_main(plane: Plane) -> tuple[str, Any]:
        tp = plane.communicator("tp")
        before = tp.plan.digest
        tp.tune(**NORM)
        assert tp.plan.digest != before
        assert tp.plan.timings is not None
        measured = {c.candidate: [n for n, _ in c.points] for c in tp.plan.timings.curves}
        assert measured == {"fused": SIZES, "composed:torch": SIZES}
        x, residual, weight = torch.ones(2, 64) * (tp.rank + 1), torch.zeros(2, 64), torch.ones(64)
        norm, new = tp.all_reduce_rms_norm(x, residual, weight)
        assert torch.equal(new, torch.full((2, 64), 3.0))
        assert torch.allclose(norm, torch.ones(2, 64))
        return tp.plan.digest, str(tp.plan.explain("all_reduce_rms_norm", nbytes=512))

    first, second = run(rank_main)
    assert first == second
    assert " us" in first[1].splitlines()[0]
    assert any(" us at 512 bytes, " in line for line in first[1].splitlines()[1:])


def test_ranks_that_measure_different_times_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 finds one way fast, rank 1 the other; the slowest rank of each counts."""
    verified = measure.Tuner._verified

    def timed(self: Any, way: Any, data: Any) -> Any:
        assert verified(self, way, data)[1] is None
        took = {(0, "fused"): 10.0, (0, "composed:torch"): 50.0, (1, "fused"): 60.0, (1, "composed:torch"): 20.0}
        return lambda _calls: took[self._rank, way.label], None

    monkeypatch.setattr(measure.Tuner, "_verified", timed)

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        tp.tune(**NORM)
        assert tp.plan.timings is not None
        explained = tp.plan.explain("all_reduce_rms_norm", nbytes=1024)
        return tp.plan.digest, explained.chosen, [(c.candidate, c.points[0][1]) for c in tp.plan.timings.curves]

    first, second = run(rank_main)
    assert first == second
    assert first[1:] == ("composed of all_reduce by torch and torch", [("composed:torch", 50.0), ("fused", 60.0)])


def test_a_way_that_gives_a_wrong_result_is_demoted_on_all_ranks_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_when_large(total: Any, residual: Any, weight: Any, eps: float, bias: float) -> Any:
        norm, new = fused.rms_norm(total, residual, weight, eps, bias)
        return norm, new + 1 if new.nbytes == 1024 else new

    monkeypatch.setattr(fused.Fused, "norm", staticmethod(wrong_when_large))

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        assert tp.plan.explain("all_reduce_rms_norm", nbytes=512).chosen == "fused"
        tp.tune(**NORM)
        answer = tp.plan.explain("all_reduce_rms_norm", nbytes=512)
        assert answer.chosen == "composed of all_reduce by torch and torch"
        return tp.plan.digest, dict(answer.others)["fused (fused)"]

    first, second = run(rank_main)
    assert first == second
    assert first[1].startswith("failed when it was tuned: ranks 0, 1: ")
    assert "the residual wrong at 256 of 256 elements" in first[1]


def test_a_plain_all_reduce_is_tuned_too() -> None:
    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        tp.tune("all_reduce", dtype=torch.float32, max_bytes=10_000)
        assert tp.plan.timings is not None
        return [(c.candidate, [n for n, _ in c.points]) for c in tp.plan.timings.curves]

    assert run(rank_main, PluginHost) == [[("torch", [8192, 10_000])]] * 2


def test_a_quantised_norm_is_tuned_as_it_is_composed() -> None:
    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        tp.tune("all_reduce_rms_norm_quant", dtype="bfloat16", sizes=[1024], hidden=128, op="fp8_token")
        assert tp.plan.timings is not None
        return [c.candidate for c in tp.plan.timings.curves if c.points]

    assert run(rank_main) == [["composed:torch", "composed_norm:fused"]] * 2


@pytest.mark.parametrize(("dtype", "op"), [("float64", "avg"), ("float16", "max"), ("int64", "min"), ("uint8", "sum")])
def test_every_op_is_verified_in_every_kind_of_dtype(dtype: str, op: str) -> None:
    """More elements than are compared at a time, the last piece a short one."""

    def rank_main(plane: Plane) -> Any:
        tp = plane.communicator("tp")
        tp.tune("all_reduce", dtype=dtype, op=op, sizes=[9_000_001])
        assert tp.plan.timings is not None
        return [(c.candidate, len(c.points), c.failed) for c in tp.plan.timings.curves]

    assert run(rank_main, PluginHost) == [[("torch", 1, "")]] * 2


@pytest.mark.parametrize("what", ["moved by a power of two", "one element", "its input"])
def test_what_is_wrong_far_in_is_found(what: str) -> None:
    subject = subject_of("", "cpu", "all_reduce", "bfloat16", 0, [5_000_000], 0, None, None)
    data = Data(subject, subject.sizes[-1], "cpu", rank=1, world_size=2)
    right = data.tensor + Data(subject, subject.sizes[-1], "cpu", rank=0, world_size=2).tensor
    data.check(right)
    if what == "moved by a power of two":
        right = right.roll(1 << 20)
    elif what == "one element":
        right[2_300_000] += 1
    else:
        data.tensor[2_300_000] += 1
    with pytest.raises(Wrong):
        data.check(right)


def test_different_arguments_are_refused_on_every_rank_and_change_nothing() -> None:
    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        with pytest.raises(errors.MismatchError) as caught:
            tp.tune(**{**NORM, "hidden": 64 * (plane.rank + 1)})
        assert tp.plan.timings is None
        tp.barrier()
        return str(caught.value)

    assert all("ranks disagree on the arguments of tune: rank 0 has hidden=64" in text for text in run(rank_main))


def test_inside_a_capture_and_of_what_cannot_be_tuned_it_is_refused() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with plane.capture(), pytest.raises(errors.CaptureError, match="tune inside a capture"):
            tp.tune(**NORM)
        with pytest.raises(errors.UnsupportedOperation, match=r"tune wants one of all_reduce, .*found 'broadcast'"):
            tp.tune("broadcast")
        with pytest.raises(errors.UnsupportedOperation, match="wants a communicator on cuda, found cpu: leave graph out"):
            tp.tune(**NORM, graph=True)
        with pytest.raises(errors.UnsupportedOperation, match="tune wants sizes of 1 byte or more"):
            tp.tune("all_reduce", sizes=[0])

    run(rank_main)
