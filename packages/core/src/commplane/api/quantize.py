"""Quantised outputs of `all_reduce_rms_norm`, in plain torch: the reference of each format, and what runs without a kernel.

The norm is rounded to its own dtype first and quantised from there, so that the values are those that quantising the unquantised
result would give. The formats are those that NVIDIA's and FlashInfer's kernels read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from commplane.api.types import QuantFormat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FP8_MAX", "Quantization", "Quantized", "misquantized", "quantize", "swizzled_offsets"]

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""

_LEAST_TOKEN_SCALE = 2.0**-9 / FP8_MAX
_LEAST_GROUP_SCALE = 1e-10
_FP4_MAX = 6.0
_FP4_BLOCK = 16
_FP4_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway between 0, .5, 1, 1.5, 2, 3, 4 and 6


@dataclass(frozen=True)
class Quantization:
    """How a norm is to be quantised; equal on all ranks.

    Attributes:
        format: one of `QuantFormat`.
        scale: one float32 on the tensor's device. ``fp8_static``: what a stored value is multiplied by to get the number back.
            ``nvfp4``: the global scale that block scales are multiplied by before they are stored. Otherwise None.
        group: of ``fp8_group``: neighbours in the last dimension that share a scale.
    """

    format: QuantFormat
    scale: Tensor | None = None
    group: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", QuantFormat(self.format))
        wanted = self.format in (QuantFormat.FP8_STATIC, QuantFormat.NVFP4)
        if wanted and self.scale is None:
            raise ValueError(f"{self.format} wants a scale, found none: give a tensor of one float32")
        if not wanted and self.scale is not None:
            raise ValueError(f"{self.format} computes its scales, found one given: leave it out")
        if self.group < 1:
            raise ValueError(f"{self.format} wants a group of 1 or more, found {self.group}")

    @property
    def label(self) -> str:
        """What has to be equal on all ranks, as text; the scale's value is not looked at, it lies on the device."""
        return f"{self.format} group={self.group}" if self.format is QuantFormat.FP8_GROUP else str(self.format)

    def misfit(self, hidden: int) -> str | None:
        """Why rows of `hidden` numbers cannot be quantised that way, or None."""
        divides = self.group if self.format is QuantFormat.FP8_GROUP else _FP4_BLOCK if self.format is QuantFormat.NVFP4 else 1
        if hidden % divides:
            return f"wants a hidden size that {divides} divides for {self.label}, found {hidden}: pad it"
        return None if hidden else f"wants a hidden size of 1 or more for {self.label}, found 0: leave the call out"


@dataclass(frozen=True)
class Quantized:
    """A quantised tensor ``[..., hidden]`` of T tokens.

    Attributes:
        format: how to read it.
        values: float8_e4m3fn of the shape of the norm; ``nvfp4``: uint8 ``[..., hidden / 2]``, the even element in the low half.
        scales: ``fp8_static``: the scale given. ``fp8_token``: float32 ``[..., 1]``. ``fp8_group``: int32
            ``[T, ceil(hidden / group / 4)]``, stored column by column with columns of T rounded up to 4; byte k of a word is the
            exponent (a power of two, biased by 127) of group 4 * column + k; what lies in a column behind token T is not
            specified. ``nvfp4``: uint8, float8_e4m3fn bit patterns of blocks of 16 at `swizzled_offsets`; padding is 0.

    Of a norm with NaN or an infinity nothing is specified: `quantize` lets NaN stay NaN, kernels may store a number for it.
    """

    format: QuantFormat
    values: Tensor
    scales: Tensor


def quantize(norm: Tensor, how: Quantization) -> Quantized:
    """Quantise ``[..., hidden]``. Local; no gradient.

    Raises:
        ValueError: hidden does not fit the format.
    """
    reason = how.misfit(norm.shape[-1])
    if reason is not None:
        raise ValueError(f"quantize {reason}")
    norm = norm.detach()
    return {
        QuantFormat.FP8_STATIC: _fp8_static,
        QuantFormat.FP8_TOKEN: _fp8_token,
        QuantFormat.FP8_GROUP: _fp8_group,
        QuantFormat.NVFP4: _nvfp4,
    }[how.format](norm, how)


def _to_fp8(values: Tensor) -> Tensor:
    """Round to nearest even; too large becomes the largest finite one, NaN stays."""
    import torch

    return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _fp8_static(norm: Tensor, how: Quantization) -> Quantized:
    assert how.scale is not None
    return Quantized(how.format, _to_fp8(norm.float() * (1.0 / how.scale.float())), how.scale)


def _fp8_token(norm: Tensor, how: Quantization) -> Quantized:
    wide = norm.float()
    scales = (wide.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(_LEAST_TOKEN_SCALE)
    return Quantized(how.format, _to_fp8(wide / scales), scales)


def _fp8_group(norm: Tensor, how: Quantization) -> Quantized:
    import torch

    hidden, group = norm.shape[-1], how.group
    wide = norm.float().reshape(-1, hidden // group, group)
    tokens, groups = wide.shape[:2]
    fraction, exponent = torch.frexp((wide.abs().amax(-1) / FP8_MAX).clamp_min(_LEAST_GROUP_SCALE))
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # the power of two that is not below
    values = _to_fp8(wide / torch.ldexp(torch.ones_like(fraction), exponent)[..., None]).reshape(norm.shape)
    columns = -(-groups // 4)
    # Columns are contiguous and as long as four tokens divide: what the kernel's loads want.
    packed = torch.zeros((columns, -(-tokens // 4) * 4, 4), dtype=torch.uint8, device=norm.device)
    padded = torch.zeros((tokens, columns * 4), dtype=torch.uint8, device=norm.device)
    padded[:, :groups] = (exponent + 127).to(torch.uint8)
    packed[:, :tokens] = padded.reshape(tokens, columns, 4).transpose(0, 1)
    return Quantized(how.format, values, packed.view(torch.int32)[..., 0].transpose(0, 1)[:tokens])


def misquantized(found: Quantized, wanted: Quantized) -> str | None:
    """What of `found` is more than one step of the format from `wanted`, or None: kernels divide and take roots approximately."""
    import torch

    for name in ("values", "scales"):
        a, b = getattr(found, name), getattr(wanted, name)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name} are {a.dtype}{list(a.shape)}, wanted {b.dtype}{list(b.shape)}"
    if wanted.format is QuantFormat.FP8_GROUP and found.scales.stride() != wanted.scales.stride():
        return f"scales have the strides {list(found.scales.stride())}, wanted {list(wanted.scales.stride())}"
    if wanted.scales.dtype is torch.uint8:
        far = (found.scales.short() - wanted.scales.short()).abs() > 1
    elif wanted.scales.dtype is torch.float32:
        far = ((found.scales - wanted.scales).abs() > 1e-6 * wanted.scales.abs()) | found.scales.isnan()
    else:
        far = found.scales != wanted.scales
    if bool(far.any()):
        return f"scale {int(far.reshape(-1).nonzero()[0])} differs"
    a, b = _steps(found), _steps(wanted)
    far = (a - b).abs() > 1
    if bool(far.any()):
        i = int(far.reshape(-1).nonzero()[0])
        return f"value {i} is {int((a - b).reshape(-1)[i])} steps of the format off"
    return None


def _steps(quantized: Quantized) -> Tensor:
    """Values as integers of which neighbours differ by 1."""
    import torch

    codes = quantized.values.contiguous().view(torch.uint8).short()
    if quantized.format is QuantFormat.NVFP4:
        codes = torch.stack([codes & 15, codes >> 4], -1)
        return torch.where(codes >= 8, 8 - codes, codes)
    return torch.where(codes >= 128, 128 - codes, codes)


def swizzled_offsets(tokens: int, blocks: int, device: object = "cpu") -> Tensor:
    """Where the scale of (token, block) is stored, ``[tokens, blocks]``: tiles of 128 tokens by 4 blocks."""
    import torch

    m = torch.arange(tokens, device=device)[:, None]  # type: ignore[call-overload]
    k = torch.arange(blocks, device=device)[None, :]  # type: ignore[call-overload]
    columns = -(-blocks // 4)
    return m // 128 * columns * 512 + k // 4 * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4  # type: ignore[no-any-return]


def _nvfp4(norm: Tensor, how: Quantization) -> Quantized:
    import torch

    assert how.scale is not None
    hidden = norm.shape[-1]
    wide = norm.float().reshape(-1, hidden // _FP4_BLOCK, _FP4_BLOCK)
    tokens, blocks = wide.shape[:2]
    given = how.scale.float()
    stored = _to_fp8(given * (wide.abs().amax(-1) * (1.0 / _FP4_MAX)))
    scale = stored.float()
    factor = torch.where(scale == 0, torch.zeros_like(scale), given / scale)
    codes = _to_fp4(wide * factor[..., None]).reshape(-1, hidden // 2, 2)
    values = (codes[..., 0] | codes[..., 1] << 4).reshape(*norm.shape[:-1], hidden // 2)
    scales = torch.zeros(-(-tokens // 128) * 128 * -(-blocks // 4) * 4, dtype=torch.uint8, device=norm.device)
    scales[swizzled_offsets(tokens, blocks, norm.device).reshape(-1)] = stored.view(torch.uint8).reshape(-1)
    return Quantized(how.format, values, scales)


def _to_fp4(values: Tensor) -> Tensor:
    """E2M1 codes, to nearest, ties to the even code; too large becomes 6."""
    import torch

    # Numbers and not a tensor of them, which could not be made inside of a capture.
    size, code = values.abs(), torch.zeros_like(values, dtype=torch.uint8)
    for lower, middle in enumerate(_FP4_MIDDLES):
        # On a tie the even code is the upper one after an odd code. A NaN is below nothing and gets the last code.
        code += ~(size < middle if lower % 2 else size <= middle)
    return code | torch.signbit(values).to(torch.uint8) << 3
