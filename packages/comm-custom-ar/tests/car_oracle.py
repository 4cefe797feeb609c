"""What `custom_ar` promises, computed in plain torch: reductions in rank order, bit for bit, and the fused norm in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.int32, torch.int64, torch.int8, torch.uint8]
DTYPES = [*FLOATS, *INTEGERS]
OPS = ["sum", "min", "max", "avg"]

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def ops_of(dtype: torch.dtype) -> list[str]:
    """The ops that `custom_ar` has for `dtype`."""
    return OPS if dtype.is_floating_point else OPS[:-1]


def inputs(world_size: int, shape: Sequence[int], dtype: torch.dtype, seed: int) -> list[Tensor]:
    """What each rank contributes: integers of the whole range, so that sums wrap; floats of both signs and many sizes."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return [torch.randint(info.min, info.max, tuple(shape), dtype=dtype, generator=generator) for _ in range(world_size)]
    return [(torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * 8).to(dtype) for _ in range(world_size)]


def patterns(world_size: int, count: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Random bits: every kind of NaN, infinities, zeros of both signs and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator) for _ in range(world_size)]
    out = [row.view(dtype) for row in rows]
    if dtype.is_floating_point:
        tiny = torch.finfo(dtype).smallest_normal / 4
        special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), tiny, -tiny, 1.0], dtype=dtype)
        for rank, row in enumerate(out):  # each special value meets each other one
            row[:64] = special.repeat(8) if rank % 2 else special.repeat_interleave(8)
    return out


def reduced(parts: Sequence[Tensor], op: str) -> Tensor:
    """In rank order; 16-bit floats in float32 and rounded once; NaN is the positive quiet one; integers wrap."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype.itemsize == 2 and dtype.is_floating_point else dtype
    out = parts[0].to(wide)
    for part in parts[1:]:
        other = part.to(wide)
        if op in ("sum", "avg"):
            out = out + other
            continue
        # Of equal ones, and +0.0 and -0.0 are, that of the higher rank.
        wins = (other <= out) if op == "min" else (other >= out)
        out = torch.where(wins | other.isnan(), other, out)
    out = (out / len(parts) if op == "avg" else out).to(dtype)
    return torch.where(out.isnan(), torch.full_like(out, float("nan")), out) if dtype.is_floating_point else out


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    if a.dtype is not b.dtype or a.shape != b.shape:
        return False
    kind = _AS_INTEGER[a.dtype.itemsize]
    return torch.equal(a.resolve_neg().contiguous().view(kind), b.resolve_neg().contiguous().view(kind))


def digest(tensors: Iterable[Tensor]) -> str:
    """One text for the bits of all of them."""
    out = hashlib.sha256()
    for tensor in tensors:
        out.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def layouts(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The numbers of `value`, which has two dimensions, in memory of several kinds. Each can be written to."""
    rows, columns = value.shape
    yield "contiguous", value.clone()
    unaligned = value.new_zeros(value.numel() + 1)[1:].reshape(rows, columns)
    yield "unaligned", unaligned.copy_(value)
    yield "transposed", value.t().clone(memory_format=torch.contiguous_format).t()
    sliced = value.new_zeros(2 * rows, columns + 3)[::2, 1 : columns + 1]
    yield "sliced", sliced.copy_(value)
    if value.dtype in (torch.float32, torch.float64):
        complex_dtype = torch.complex64 if value.dtype is torch.float32 else torch.complex128
        conjugate = torch.zeros(rows, columns, dtype=complex_dtype).conj().imag
        assert conjugate.is_neg()  # the numbers in memory are the negative ones
        yield "negative view", conjugate.copy_(value)


def normed(parts: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float, weight_bias: float) -> tuple[Tensor, Tensor]:
    """The norm in float64 of the new residual, which is exact: the sum rounded to the dtype, plus `residual`, rounded."""
    dtype = residual.dtype
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    total = (reduced(parts, "sum").to(wide) + residual.to(wide)).to(dtype)
    v = total.double()
    norm = v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps) * (weight_bias + weight.double())
    return norm, total


def ulps(got: Tensor, wanted: Tensor) -> float:
    """The largest distance of `got` from `wanted`, float64, in units of the last place of `got`'s dtype."""
    if got.numel() == 0:
        return 0.0
    info = torch.finfo(got.dtype)
    place = torch.exp2(wanted.abs().clamp_min(info.smallest_normal).log2().floor()) * info.eps
    return float(((got.double() - wanted).abs() / place).max())
