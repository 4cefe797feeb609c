"""What collectives are to give, computed in plain torch on one rank from what all ranks contribute.

The reference of a reduction is exact or float64. A backend may add in any order and in any precision that is not below that of
the dtype, so a float sum may be off by one rounding for each addition: at most (N - 1) * eps * sum(|x|), and one more for a mean
(Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). Integers wrap and have one right result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from commplane.api import QuantFormat, Quantization, Quantized, misquantized, quantize

__all__ = [
    "expect",
    "expect_bits",
    "expect_norm",
    "expect_quantized",
    "inputs",
    "layouts",
    "reduced",
    "special_rows",
    "special_values",
]

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def inputs(world_size: int, shape: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """What each rank contributes, the same wherever it is computed: floats of both signs, integers of the whole range."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return [torch.randint(info.min, info.max, tuple(shape), dtype=dtype, generator=generator) for _ in range(world_size)]
    return [(torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * 8).to(dtype) for _ in range(world_size)]


def special_values(world_size: int, dtype: torch.dtype) -> list[Tensor]:
    """Floats among which each special value meets each other one: NaN, infinities, zeros of both signs, denormals."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), tiny, -tiny, 1.0], dtype=dtype)
    return [special.repeat(8) if rank % 2 else special.repeat_interleave(8) for rank in range(world_size)]


def reduced(parts: Sequence[Tensor], op: str) -> Tensor:
    """Of floats in float64, of integers in their own dtype. NaN on any rank is NaN."""
    wide = torch.stack([p.double() if p.is_floating_point() else p for p in parts])
    if op == "min":
        return wide.amin(0)
    if op == "max":
        return wide.amax(0)
    total = wide.sum(0, dtype=wide.dtype)
    return total / len(parts) if op == "avg" else total


def expect(what: str, got: Tensor, parts: Sequence[Tensor], op: str) -> None:
    """Raise unless `got` is the reduction of `parts`, within what the order and precision of additions may change."""
    dtype = parts[0].dtype
    wanted = reduced(parts, op)
    _expect_form(what, got, wanted.shape, dtype)
    got = got.detach().cpu()
    if not dtype.is_floating_point or op in ("min", "max"):
        _report(what, got != wanted.to(dtype), got, wanted)
        return
    size = torch.stack([p.double().abs() for p in parts]).sum(0)
    info = torch.finfo(dtype)
    roundings = len(parts) - 1 if op == "sum" else len(parts)
    bound = roundings * info.eps * (size / len(parts) if op == "avg" else size) + info.smallest_normal * info.eps
    _report(what, ~((got.double() - wanted).abs() <= bound), got, wanted)


def expect_bits(what: str, got: Tensor, wanted: Tensor) -> None:
    """Raise unless the tensors are equal in shape, dtype and every bit."""
    _expect_form(what, got, wanted.shape, wanted.dtype)
    kind = _AS_INTEGER[wanted.dtype.itemsize]
    a, b = (t.detach().cpu().resolve_neg().contiguous() for t in (got, wanted))
    _report(what, a.view(kind) != b.view(kind), a, b)


def expect_norm(what: str, got: Tensor, total: Tensor, weight: Tensor, eps: float, weight_bias: float) -> None:
    """Raise unless `got` is the RMS norm of `total`, the new residual that the backend itself gave, within two roundings."""
    _expect_form(what, got, total.shape, total.dtype)
    v = total.detach().cpu().double()
    wanted = v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps) * (weight_bias + weight.detach().cpu().double())
    info = torch.finfo(got.dtype)
    # One rounding to the dtype, and what a sum of squares and an approximate root in the wide type may be off by.
    wide = 8 * info.eps if got.dtype is torch.float64 else 2e-5
    bound = wanted.abs() * (info.eps + wide) + info.smallest_normal
    _report(what, ~((got.detach().cpu().double() - wanted).abs() <= bound), got.detach().cpu(), wanted)


def expect_quantized(what: str, got: Quantized, norm: Tensor, how: Quantization) -> None:
    """Raise unless `got` is `norm`, which the backend itself gave, in the format of `how`.

    Scales and values may be one step of the format off, as kernels divide approximately. To FP8 that happens on a tie alone, so
    few may be: a rounding of another kind, or of a norm that was not rounded to its dtype first, moves more.
    """
    assert got.format is how.format, f"{what}: wanted the format {how.format}, found {got.format}"
    assert got.values.device == norm.device == got.scales.device, f"{what}: wanted all on {norm.device}, found another device"
    wanted = quantize(norm, how)
    wrong = misquantized(got, wanted)
    assert wrong is None, f"{what}: the result is not its norm as {how.label}: {wrong}"
    if how.format is QuantFormat.NVFP4:
        return
    off = int((got.values.contiguous().view(torch.uint8) != wanted.values.contiguous().view(torch.uint8)).sum())
    most = max(2, got.values.numel() // 200)
    assert off <= most, f"{what}: wanted nearest, ties to even, found {off} of {got.values.numel()} values in the next step"


def special_rows(hidden: int, dtype: torch.dtype) -> Tensor:
    """Rows that are hard to scale: zeros, the least normal numbers, one number among zeros, all equal, alternating, a ramp."""
    rows = torch.zeros(6, hidden, dtype=torch.float64)
    rows[1] = torch.finfo(dtype).smallest_normal
    rows[2, hidden // 2] = 100.0
    rows[3] = 3.0
    rows[4] = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(hidden // 2)
    rows[5] = torch.linspace(-8.0, 8.0, hidden, dtype=torch.float64)
    return rows.to(dtype)


def layouts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The numbers of `value`, which has two dimensions, in memory of several kinds. Each can be written to."""
    rows, columns = value.shape
    yield "contiguous", value.clone()
    unaligned = value.new_zeros(value.numel() + 1)[1:].reshape(rows, columns)
    yield "unaligned", unaligned.copy_(value)
    yield "transposed", value.t().clone(memory_format=torch.contiguous_format).t()
    sliced = value.new_zeros(2 * rows, columns + 3)[::2, 1 : columns + 1]
    yield "sliced", sliced.copy_(value)


def _expect_form(what: str, got: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    if got.shape != torch.Size(shape) or got.dtype is not dtype:
        raise AssertionError(f"{what}: wanted {dtype} {list(shape)}, found {got.dtype} {list(got.shape)}")


def _report(what: str, wrong: Tensor, got: Tensor, wanted: Tensor) -> None:
    if bool(wrong.any()):
        flat = wrong.reshape(-1).nonzero().reshape(-1)
        at = int(flat[0])
        raise AssertionError(
            f"{what}: {len(flat)} of {wrong.numel()} elements are wrong, first element {at}: "
            f"found {got.reshape(-1)[at].item()!r}, wanted {wanted.reshape(-1)[at].item()!r}"
        )
