"""`all_reduce_rms_norm` of a communicator: composed, whole, and whole for some sizes only; threads as ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fused
import pytest
import torch

from commplane import errors
from commplane.api import Capability, Collective, Requirement
from commplane.plugins import PluginHost
from commplane.runtime import Communicator, Plane
from commplane.runtime.dispatch import RecordingTable
from commplane.testing import run_threads

HIDDEN = 64
# Of float32 rows of 64: one is composed, two and three are whole, four are composed again.
SOME_SIZES = {"min_bytes": 512, "max_bytes": 1023}


def run(function: Callable[[Plane], Any], world_size: int = 2, plugins: Callable[[], PluginHost] = PluginHost) -> list[Any]:
    out = run_threads(world_size, function, plugins=lambda _rank: plugins(), config=lambda _rank: {"timeout": 20})
    for result in out:
        if isinstance(result, Exception):
            raise result
    return out


def parts(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def given(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual and weight, equal on all ranks."""
    return parts(100, shape, dtype), parts(101, shape[-1:], dtype)


def expected(world_size: int, shape: tuple[int, ...], dtype: torch.dtype, eps: float, weight_bias: float) -> Any:
    """By definition, with the sum in rank order. Exact for 2 ranks on every backend, because a sum of two has one order."""
    total = parts(0, shape, dtype)
    for rank in range(1, world_size):
        total = total + parts(rank, shape, dtype)
    return fused.rms_norm(total, *given(shape, dtype), eps, weight_bias)


def same(got: Any, wanted: Any) -> bool:
    return all(torch.equal(g, w) and g.dtype is w.dtype for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_composed_on_torch_it_gives_the_bits_of_the_definition_and_leaves_its_inputs(dtype: torch.dtype) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for shape in ((HIDDEN,), (5, HIDDEN), (2, 3, HIDDEN), (40, 1000)):
            for weight_bias in (0.0, 1.0):
                x, (residual, weight) = parts(tp.rank, shape, dtype), given(shape, dtype)
                got = tp.all_reduce_rms_norm(x, residual, weight, eps=1e-5, weight_bias=weight_bias)
                assert same(got, expected(2, shape, dtype, 1e-5, weight_bias))
                assert same((x, residual, weight), (parts(tp.rank, shape, dtype), *given(shape, dtype)))
                assert len({t.untyped_storage().data_ptr() for t in (*got, x, residual, weight)}) == 5

    run(rank_main)


def test_eps_is_one_millionth_and_weight_bias_none_unless_said() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        shape = (2, HIDDEN)
        got = tp.all_reduce_rms_norm(parts(tp.rank, shape, torch.float32), *given(shape, torch.float32))
        assert same(got, expected(2, shape, torch.float32, 1e-6, 0.0))

    run(rank_main)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_backend_that_has_it_is_called_for_it_on_all_ranks(world_size: int) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        assert tp.plan.explain("all_reduce_rms_norm", dtype="bfloat16").chosen == "fused"
        backend = tp._named["fused"]
        assert isinstance(backend, fused.Fused)
        before = backend.calls
        got = tp.all_reduce_rms_norm(
            parts(tp.rank, (5, HIDDEN), torch.bfloat16), *given((5, HIDDEN), torch.bfloat16), eps=0.5, weight_bias=1.0
        )
        assert same(got, expected(world_size, (5, HIDDEN), torch.bfloat16, 0.5, 1.0))
        assert backend.calls == before + 1

    run(rank_main, world_size, lambda: fused.host(min_world_size=1))


def test_sizes_that_its_backend_does_not_serve_are_composed_with_the_same_bits() -> None:
    def rank_main(plane: Plane) -> list[int]:
        tp = plane.communicator("tp")
        backend = tp._named["fused"]
        assert isinstance(backend, fused.Fused)
        calls = []
        for rows in (0, 1, 2, 3, 4, 300, 2, 1):
            before, shape = backend.calls, (rows, HIDDEN)
            got = tp.all_reduce_rms_norm(parts(tp.rank, shape, torch.float32), *given(shape, torch.float32), eps=1e-5)
            assert same(got, expected(2, shape, torch.float32, 1e-5, 0.0))
            calls.append(backend.calls - before)
        got = tp.all_reduce_rms_norm(parts(tp.rank, (2, HIDDEN), torch.float64), *given((2, HIDDEN), torch.float64))
        assert same(got, expected(2, (2, HIDDEN), torch.float64, 1e-6, 0.0))
        return calls

    assert run(rank_main, plugins=lambda: fused.host(**SOME_SIZES)) == [[0, 0, 1, 1, 0, 0, 1, 0]] * 2


def test_a_size_that_nothing_serves_is_refused_and_the_communicator_goes_on() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        shape = (1, HIDDEN)
        x, (residual, weight) = parts(tp.rank, shape, torch.float32), given(shape, torch.float32)
        with pytest.raises(errors.UnsupportedOperation, match=r"all_reduce_rms_norm of 256 bytes of .*nor can it be composed"):
            tp.all_reduce_rms_norm(x, residual, weight)
        x, (residual, weight) = parts(tp.rank, (2, HIDDEN), torch.float32), given((2, HIDDEN), torch.float32)
        assert same(tp.all_reduce_rms_norm(x, residual, weight), expected(2, (2, HIDDEN), torch.float32, 1e-6, 0.0))

    out = run_threads(
        2,
        rank_main,
        plugins=lambda _rank: fused.host(**SOME_SIZES, numerics="rank_order"),
        config=lambda _rank: {"timeout": 20, "numerics": "rank_order"},
    )
    assert out == [None, None], out


@pytest.mark.parametrize("plugins", [PluginHost, fused.host], ids=["composed", "whole"])
def test_no_rows_no_hidden_other_layouts_and_leaves_that_require_grad(plugins: Callable[[], PluginHost]) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        for shape in ((0, HIDDEN), (3, 0), (0,), (2, 0, HIDDEN)):
            x, (residual, weight) = parts(tp.rank, shape, torch.float32), given(shape, torch.float32)
            assert [t.shape for t in tp.all_reduce_rms_norm(x, residual, weight)] == [torch.Size(shape)] * 2
        shape = (6, HIDDEN)
        x, (residual, weight) = parts(tp.rank, shape, torch.float32), given(shape, torch.float32)
        wanted = expected(2, shape, torch.float32, 1e-6, 0.0)
        strided = (x.t().contiguous().t(), residual.t().contiguous().t())
        assert not strided[0].is_contiguous()
        spaced = weight.repeat_interleave(2)[::2]
        assert same(tp.all_reduce_rms_norm(*strided, spaced), wanted)
        leaves = (x.clone().requires_grad_(), residual.clone().requires_grad_(), weight.clone().requires_grad_())
        got = tp.all_reduce_rms_norm(*leaves)
        assert same(got, wanted) and not any(t.requires_grad for t in got)
        row = residual[:1].expand(6, HIDDEN)
        x = parts(tp.rank, (1, HIDDEN), torch.float32).expand(6, HIDDEN)
        total = parts(0, (1, HIDDEN), torch.float32) + parts(1, (1, HIDDEN), torch.float32)
        assert same(tp.all_reduce_rms_norm(x, row, weight), fused.rms_norm(total.expand(6, HIDDEN), row, weight, 1e-6, 0.0))

    run(rank_main, plugins=plugins)


X, W, C = torch.zeros(2, 4), torch.zeros(4), torch.zeros(2, 4, dtype=torch.complex64)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tensor": torch.tensor(1.0)}, r"wants a tensor of \[..., hidden\], found a scalar"),
    ({"tensor": X.int(), "residual": X.int(), "weight": W.int()}, "wants a floating-point dtype, found torch.int32"),
    ({"tensor": C, "residual": C, "weight": C[0]}, "wants a floating-point dtype, found torch.complex64"),
    ({"residual": torch.zeros(4, 2)}, r"wants a residual of shape \[2, 4\] with a tensor of \[2, 4\], found \[4, 2\]"),
    ({"residual": torch.zeros(4)}, r"found \[4\]"),
    ({"weight": torch.zeros(2)}, r"wants a weight of shape \[4\] with a tensor of \[2, 4\], found \[2\]"),
    ({"weight": torch.zeros(1, 4)}, r"wants a weight of shape \[4\] .* found \[1, 4\]"),
    ({"weight": torch.zeros(())}, r"wants a weight of shape \[4\] .* found \[\]"),
    ({"residual": X.bfloat16()}, "wants a residual of dtype torch.float32, that of the tensor, found torch.bfloat16"),
    ({"weight": W.double()}, "wants a weight of dtype torch.float32, that of the tensor, found torch.float64"),
    ({"residual": X.to("meta")}, "wants a residual of device cpu, that of the tensor, found meta"),
    ({"weight": W.to("meta")}, "wants a weight of device cpu, that of the tensor, found meta"),
    ({"residual": X.to_sparse()}, "wants a residual of layout torch.strided, that of the tensor, found torch.sparse_coo"),
    ({"weight": W.to_sparse()}, "wants a weight of layout torch.strided"),
    ({"tensor": X.to_sparse()}, "wants a residual of layout torch.sparse_coo, that of the tensor, found torch.strided"),
    ({"tensor": X.to_sparse(), "residual": X.to_sparse(), "weight": W.to_sparse()}, "wanted a dense tensor, found layout"),
    ({"tensor": X.to("meta"), "residual": X.to("meta"), "weight": W.to("meta")}, "wanted a tensor on cpu, found one on meta"),
    *(({"eps": eps}, "wants a finite eps of 0 or more, found") for eps in (-1e-6, float("nan"), float("inf"))),
    *(({"weight_bias": b}, "wants a finite weight_bias, such as 0.0 or 1.0, found") for b in (float("nan"), float("-inf"))),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[f"{i} {'+'.join(c)}" for i, (c, _) in enumerate(WRONG)])
def test_what_does_not_fit_is_refused_on_one_rank_before_anything_is_sent(changes: dict[str, Any], words: str) -> None:
    def rank_main(plane: Plane) -> float:
        tp = plane.communicator("tp")
        arguments: dict[str, Any] = {"tensor": X, "residual": X, "weight": W, "eps": 1e-6, "weight_bias": 0.0}
        if tp.rank == 1:  # alone: had it sent anything, the next call would meet it
            with pytest.raises(errors.UnsupportedOperation, match=rf"^\[tp rank 1/2.*\] .*{words}"):
                tp.all_reduce_rms_norm(**(arguments | changes))
        return tp.all_reduce(torch.ones(1)).item()

    assert run(rank_main) == [2.0, 2.0]


def test_an_eps_of_zero_and_whole_numbers_are_taken() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        norm, _ = tp.all_reduce_rms_norm(torch.ones(1, 4), torch.ones(1, 4), torch.ones(4), eps=0, weight_bias=1)
        assert torch.equal(norm, torch.full((1, 4), 2.0))

    run(rank_main)


def test_closed_it_says_so() -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        tp.close()
        with pytest.raises(errors.CommunicatorError, match="is closed"):
            tp.all_reduce_rms_norm(X, X, W)

    run(rank_main)


def test_an_error_of_the_norm_after_the_sum_poisons(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        with pytest.raises(RuntimeError, match="no memory"):
            tp.all_reduce_rms_norm(X, X, W)
        with pytest.raises(errors.CommunicatorError, match="poisoned"):
            tp.all_reduce(X)

    def fail(*_args: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("commplane.runtime.dispatch.add_rms_norm", fail)
    run(rank_main)


# Memory and capture.


@pytest.mark.parametrize(
    ("limits", "max_bytes", "wanted"),
    [
        ({}, 4096, {"all_reduce_rms_norm": 4096}),
        (SOME_SIZES, 4096, {"all_reduce_rms_norm": 4096, "all_reduce": 4096}),
        (SOME_SIZES, 900, {"all_reduce_rms_norm": 900, "all_reduce": 511}),
        ({"max_bytes": 99}, 99, {"all_reduce_rms_norm": 99}),
        ({"max_bytes": 99}, 100, {"all_reduce_rms_norm": 100, "all_reduce": 100}),
        ({"dtypes": {"bfloat16"}}, 8, {"all_reduce_rms_norm": 8, "all_reduce": 8}),
    ],
)
def test_prepare_asks_for_the_all_reduce_of_the_sizes_that_are_composed(
    limits: dict[str, Any], max_bytes: int, wanted: dict[str, int]
) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        tp.prepare("all_reduce_rms_norm", dtype=torch.float32, max_bytes=max_bytes)
        backend = tp._named["fused"]
        assert isinstance(backend, fused.Fused)
        assert backend.requirements == [Requirement(Collective(name), "float32", size) for name, size in wanted.items()]
        x, (residual, weight) = parts(tp.rank, (2, 4), torch.float32), given((2, 4), torch.float32)
        assert same(tp.all_reduce_rms_norm(x, residual, weight), expected(2, (2, 4), torch.float32, 1e-6, 0.0))

    run(rank_main, plugins=lambda: fused.host(**limits))


def capturing() -> PluginHost:
    return fused.host(capabilities={Capability.ALL_REDUCE_RMS_NORM, Capability.CAPTURE}, max_bytes=1023)


def test_captured_calls_whole_and_composed_are_one_record_each() -> None:
    def rank_main(plane: Plane) -> list[str]:
        tp = plane.communicator("tp")
        with plane.capture():
            table = tp._table
            for rows in (3, 5):
                x, (residual, weight) = parts(tp.rank, (rows, HIDDEN), torch.float32), given((rows, HIDDEN), torch.float32)
                got = tp.all_reduce_rms_norm(x, residual, weight, 1e-5, 1 if tp.rank else 1.0)
                assert same(got, expected(2, (rows, HIDDEN), torch.float32, 1e-5, 1.0))
        assert isinstance(table, RecordingTable)
        return table.records

    wanted = [f"all_reduce_rms_norm(torch.float32 {n} bytes hidden=64 eps=1e-05 weight_bias=1.0)" for n in (768, 1280)]
    assert run(rank_main, plugins=capturing) == [wanted, wanted]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda rank: ((2, HIDDEN) if rank else (1, 2 * HIDDEN), 1e-6, 0.0), "hidden=128 .* rank 1 has .* hidden=64"),
        (lambda rank: ((1, HIDDEN), [1e-6, 1e-5][rank], 0.0), "eps=1e-06 .* rank 1 has .* eps=1e-05"),
        (lambda rank: ((1, HIDDEN), 1e-6, float(rank)), r"weight_bias=0.0\); rank 1 has .* weight_bias=1.0"),
    ],
    ids=["hidden", "eps", "weight_bias"],
)
def test_a_capture_finds_ranks_that_normalise_differently(
    arguments: Callable[[int], tuple[tuple[int, ...], float, float]], words: str
) -> None:
    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        shape, eps, weight_bias = arguments(tp.rank)
        with pytest.raises(errors.CaptureError, match=words), plane.capture():
            tp.all_reduce_rms_norm(parts(tp.rank, shape, torch.float32), *given(shape, torch.float32), eps, weight_bias)

    run(rank_main, plugins=capturing)


# The canary.


def broken(how: str) -> fused.Norm:
    """The definition, with one mistake."""

    def norm(total: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_bias: float) -> Any:
        if how == "no residual":
            residual = torch.zeros_like(residual)
        if how == "no eps":
            eps = 0.0
        if how == "no weight":
            weight = torch.ones_like(weight)
        if how == "no weight_bias":
            weight_bias = 0.0
        result, new = fused.rms_norm(total, residual, weight, eps, weight_bias)
        if how == "norm of the sum":
            result, _ = fused.rms_norm(total, torch.zeros_like(residual), weight, eps, weight_bias)
        if how == "old residual":
            new = residual
        if how == "residual in place":
            residual.copy_(new)
        if how == "weight in place":
            weight.add_(weight_bias)
        if how == "mean of all rows":
            v = new.float()
            result = (v * torch.rsqrt(v.pow(2).mean() + eps) * (weight_bias + weight.float())).to(new.dtype)
        if how == "three places off":
            result = result * (1 + 3 * torch.finfo(result.dtype).eps)
        if how == "NaN":
            result = result * float("nan")
        if how == "flat":
            result = result.reshape(-1)
        if how == "wide":
            result = result.double()
        return result, new

    return norm


MISTAKES = [
    "no residual", "no eps", "no weight", "no weight_bias", "norm of the sum", "old residual", "residual in place",
    "weight in place", "mean of all rows", "three places off", "NaN", "flat", "wide",
]  # fmt: skip


def refusal(tp: Communicator) -> str:
    (candidate,) = (c for c in tp.plan.candidates if c.name == "fused")
    return f"{candidate.state}: {candidate.reason}"


@pytest.mark.parametrize("how", MISTAKES)
def test_the_canary_takes_out_a_backend_that_normalises_wrongly(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.Fused, "norm", staticmethod(broken(how)))

    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        got = tp.all_reduce_rms_norm(parts(tp.rank, (2, 4), torch.float32), *given((2, 4), torch.float32))
        assert same(got, expected(2, (2, 4), torch.float32, 1e-6, 0.0))
        return refusal(tp)

    said = run(rank_main, plugins=fused.host)
    assert said[0] == said[1]
    assert said[0].startswith("canary: ") and "all_reduce_rms_norm with eps " in said[0], said[0]


def test_the_canary_takes_out_a_backend_that_leaves_a_rank_out_and_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fused.Fused.all_reduce_rms_norm

    def deaf(self: fused.Fused, tensor: torch.Tensor, *rest: Any) -> Any:
        return whole(self, tensor * (self.context.rank != 1), *rest)

    monkeypatch.setattr(fused.Fused, "all_reduce_rms_norm", deaf)
    said = run(lambda plane: refusal(plane.communicator("tp")), 3, fused.host)
    assert all("element 1, which tells whether rank 1 took part" in text for text in said), said


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_canary_lets_a_right_backend_pass_in_every_floating_dtype(world_size: int) -> None:
    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        backend = tp._named["fused"]
        assert isinstance(backend, fused.Fused)
        assert backend.calls == 2 * 4  # two rounds in each dtype that has a norm
        return refusal(tp)

    everything = {"float16", "bfloat16", "float32", "float64", "int8"}
    assert run(rank_main, world_size, lambda: fused.host(dtypes=everything)) == ["ready: "] * world_size


def test_a_backend_that_only_declares_it_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fused.Fused, "all_reduce_rms_norm")

    def rank_main(plane: Plane) -> str:
        return refusal(plane.communicator("tp"))

    for text in run(rank_main, plugins=fused.host):
        assert "declares all_reduce_rms_norm but Fused does not override all_reduce_rms_norm" in text
