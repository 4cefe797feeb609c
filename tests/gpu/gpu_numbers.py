"""What a sum over ranks on GPUs has to be, in plain torch on the GPU, and how bits are compared there."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def inputs(world_size: int, count: int, dtype: torch.dtype, seed: int, device: torch.device) -> list[Tensor]:
    """What each rank contributes: both signs, some orders of magnitude. Equal on all ranks, whose GPUs are of one kind."""
    generator = torch.Generator(device).manual_seed(seed)
    parts = torch.randn(world_size, count, generator=generator, device=device)
    return list((parts * 8).to(dtype))


def reduced(parts: list[Tensor]) -> Tensor:
    """In rank order, in float32, rounded once."""
    out = parts[0].float()
    for part in parts[1:]:
        out = out + part.float()
    return out.to(parts[0].dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_AS_INTEGER[tensor.element_size()])


def checksum(tensor: Tensor) -> int:
    """A number for the bits of a tensor and their order, to be compared between ranks."""
    flat = bits(tensor).flatten().long()
    return int((flat * (torch.arange(flat.numel(), device=flat.device) % 65521 + 1)).sum())


def expect(what: object, got: Tensor, wanted: Tensor) -> None:
    """Bitwise equal, but for the bits of a NaN."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, (what, got.shape, wanted.shape, got.dtype)
    wrong = (bits(got) != bits(wanted)) & ~(got.contiguous().isnan() & wanted.contiguous().isnan())
    if bool(wrong.any()):
        at = wrong.flatten().nonzero().flatten()
        first = int(at[0])
        shown = (got.flatten()[first].item(), wanted.flatten()[first].item())
        raise AssertionError(f"{what}: {at.numel()} of {got.numel()} are wrong, the first at {first}: got, wanted {shown}")


def ulps(got: Tensor, wanted: Tensor) -> float:
    """The largest distance of `got` from `wanted`, in units of the last place of the dtype of `got`."""
    info = torch.finfo(got.dtype)
    exact = wanted.double()
    place = torch.exp2(exact.abs().clamp_min(info.smallest_normal).log2().floor()) * info.eps
    return float(((got.double() - exact).abs() / place).max())
