"""`add_rms_norm`, against the definition written out: the same bits at every size, which is how it is cut, and dtype."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import fused
import pytest
import torch

from commplane.api import add_rms_norm, norm

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# One call, one block, several with a shorter last one; one row of several blocks.
SHAPES = [(1, 64), (7, 1000), (3, 2, 8192), (50, 2000), (99, 4096), (3, 300_000), (2, 3, 131_072)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """With several, torch shares out one long row, and the order in which its squares are added is another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return total, residual, torch.randn(shape[-1], generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
def test_it_gives_the_bits_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype, weight_bias: float) -> None:
    total, residual, weight = inputs(shape, dtype)
    wanted = fused.rms_norm(total, residual, weight, 1e-5, weight_bias)
    kept = residual.clone(), weight.clone()
    got = add_rms_norm(total, residual, weight, 1e-5, weight_bias)
    assert [g.dtype for g in got] == [dtype, dtype]
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(residual, kept[0]) and torch.equal(weight, kept[1])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] < 32_768], ids=str)
def test_with_hidden_sizes_of_models_the_bits_do_not_depend_on_the_threads(shape: tuple[int, ...]) -> None:
    total, residual, weight = inputs(shape, torch.bfloat16)
    wanted = fused.rms_norm(total, residual, weight, 1e-5, 0.0)
    torch.set_num_threads(3)
    assert torch.equal(add_rms_norm(total, residual, weight, 1e-5)[0], wanted[0])


def test_the_shapes_above_go_through_one_call_one_block_and_several() -> None:
    sizes = sorted(torch.Size(s).numel() for s in SHAPES)
    assert any(n <= norm._ONE_CALL for n in sizes)
    for block in (norm._BLOCK, norm._BLOCK_NARROW):
        assert any(norm._ONE_CALL < n <= block for n in sizes) and any(n > block for n in sizes)
    assert any(s[-1] > norm._BLOCK for s in SHAPES) and any(len(s) > 2 and torch.Size(s).numel() > norm._BLOCK for s in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_torch_that_rounds_before_the_weight_is_not_asked(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_in_torch_2_4(x: torch.Tensor, shape: object, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    total, residual, weight = inputs((7, 1000), dtype)
    wanted, _ = fused.rms_norm(total, residual, weight, 1e-5, 0.0)
    assert not torch.equal(as_in_torch_2_4(total + residual, None, weight, 1e-5), wanted)
    monkeypatch.setattr(torch, "rms_norm", as_in_torch_2_4)
    norm._rounds_once.cache_clear()
    try:
        assert not norm._rounds_once("cpu")
        assert torch.equal(add_rms_norm(total, residual, weight, 1e-5)[0], wanted)
    finally:
        norm._rounds_once.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 1000), (99, 4096)], ids=str)
def test_in_16_bits_it_is_within_one_place_of_a_norm_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    total, residual, weight = inputs(shape, dtype)
    v = (total + residual).double()
    exact = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    got = add_rms_norm(total, residual, weight, 1e-5)[0].double()
    place = torch.finfo(dtype).eps * torch.exp2(exact.abs().log2().floor()).clamp_min(torch.finfo(dtype).tiny)
    assert ((got - exact).abs() <= place).all()


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (0,), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_bias", [0.0, 1.0])
def test_nothing_gives_nothing_of_the_same_shape(shape: tuple[int, ...], dtype: torch.dtype, weight_bias: float) -> None:
    nothing, weight = torch.zeros(shape, dtype=dtype), torch.ones(shape[-1], dtype=dtype)
    got = add_rms_norm(nothing.clone(), nothing, weight, 1e-6, weight_bias)
    assert [(g.shape, g.dtype) for g in got] == [(torch.Size(shape), dtype)] * 2


@pytest.mark.parametrize("rows", [7, 600])
def test_tensors_that_are_not_contiguous_give_what_their_copies_give(rows: int) -> None:
    total, residual = (t.t() for t in inputs((1000, rows), torch.bfloat16)[:2])
    weight = torch.randn(2000).bfloat16()[::2]
    for r in (residual, residual[:1].expand(rows, 1000)):
        wanted = fused.rms_norm(total.contiguous(), r.contiguous(), weight.contiguous(), 1e-5, 0.0)
        got = add_rms_norm(total, r, weight, 1e-5)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("rows", [7, 600])
def test_what_requires_grad_is_left_as_it_was_and_the_results_do_not(rows: int) -> None:
    total, residual, weight = (t.requires_grad_() for t in inputs((rows, 1000), torch.float32))
    before = residual.detach().clone(), weight.detach().clone()
    for result in add_rms_norm(total, residual, weight, 1e-5, 1.0):
        assert not result.requires_grad
    assert torch.equal(residual, before[0]) and torch.equal(weight, before[1])
    assert residual.requires_grad and weight.requires_grad


@pytest.mark.parametrize("shape", [(7, 1000), (50, 2000), (99, 4096)], ids=str)
def test_the_default_dtype_of_torch_changes_nothing(shape: tuple[int, ...]) -> None:
    total, residual, weight = inputs(shape, torch.bfloat16)
    wanted = fused.rms_norm(total, residual, weight, 1e-5, 1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = add_rms_norm(total, residual, weight, 1e-5, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_it_warns_of_nothing() -> None:
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for shape in ((7, 1000), (50, 2000), (99, 4096)):
                for weight_bias in (0.0, 1.0):
                    add_rms_norm(*inputs(shape, torch.bfloat16), 1e-5, weight_bias)
    finally:
        torch.set_warn_always(False)


def test_a_row_of_zeros_is_zeros_with_an_eps_and_nan_without() -> None:
    zeros, weight = torch.zeros(2, 8), torch.ones(8)
    assert torch.equal(add_rms_norm(zeros.clone(), zeros, weight, 1e-6)[0], zeros)
    assert add_rms_norm(zeros.clone(), zeros, weight, 0.0)[0].isnan().all()
