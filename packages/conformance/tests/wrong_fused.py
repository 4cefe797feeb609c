"""Backends whose quantised norm is wrong in one thing each, and the test of the kit that is meant to find it.

The kit forms its groups without the canary, which would leave some of these out. The class docstring says what is wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from caught import catalogue
from honest import LARGE, Honest
from torch import Tensor

from commplane.api import QuantFormat, Quantization, Quantized, add_rms_norm, quantize
from commplane.api.quantize import swizzled_offsets

CAUGHT_BY, caught_by = catalogue()


@caught_by("fused_quant::test_values[bfloat16-2-ranks-fp8_static]")
class ScaleInverted(Honest):
    """The norm is multiplied by the scale that it has to be divided by."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        if how.format is not QuantFormat.FP8_STATIC or how.scale is None:
            return super().quantized(norm, how)
        return replace(super().quantized(norm, replace(how, scale=1 / how.scale)), scales=how.scale)


@caught_by("fused_quant::test_values[float32-2-ranks-fp8_static]")
class Truncates(Honest):
    """Values are cut off towards zero, never more than one step away."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.FP8_STATIC or how.scale is None:
            return out
        codes = out.values.view(torch.uint8)
        up = out.values.float().abs() > (norm.float() / how.scale.float()).abs()
        return replace(out, values=(codes - up.to(torch.uint8)).view(torch.float8_e4m3fn))


@caught_by("fused_quant::test_values[float16-2-ranks-fp8_token]")
class ScaleOfTheTensor(Honest):
    """One scale for all tokens."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        if how.format is not QuantFormat.FP8_TOKEN or not norm.numel():
            return super().quantized(norm, how)
        scale = norm.float().abs().amax() / 448
        values = quantize(norm, Quantization("fp8_static", scale.reshape(1))).values
        return Quantized(how.format, values, scale.expand(*norm.shape[:-1], 1).clone())


@caught_by("fused_quant::test_zeros_the_least_numbers_and_what_is_too_large[float32-2-ranks-fp8_token]")
class DividesByZero(Honest):
    """A row of zeros has the scale 0, and its values are NaN."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.FP8_TOKEN:
            return out
        scale = norm.float().abs().amax(-1, keepdim=True) / 448
        return Quantized(how.format, (norm.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale)


@caught_by("fused_quant::test_zeros_the_least_numbers_and_what_is_too_large[bfloat16-2-ranks-fp8_static]")
class DoesNotSaturate(Honest):
    """What is too large for the format becomes NaN, as the bare conversion makes it."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.FP8_STATIC or how.scale is None:
            return out
        nan = torch.full_like(out.values.view(torch.uint8), 127)
        large = (norm.float() / how.scale.float()).abs() > 464
        return replace(out, values=torch.where(large, nan, out.values.view(torch.uint8)).view(torch.float8_e4m3fn))


@caught_by("fused_quant::test_values[bfloat16-2-ranks-fp8_group]")
class ExponentRoundedDown(Honest):
    """The scale of a group is the power of two below, and the largest values are cut."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.FP8_GROUP or not norm.numel():
            return out
        values = (out.values.float() * 2).clamp(-448, 448).to(torch.float8_e4m3fn)
        lower = out.scales.clone(memory_format=torch.preserve_format)
        for group in range(norm.shape[-1] // how.group):
            lower[:, group // 4] -= 1 << 8 * (group % 4)
        return Quantized(how.format, values, lower)


@caught_by("fused_quant::test_values[float16-2-ranks-fp8_group]")
class GroupScalesRowMajor(Honest):
    """Scales of groups are stored row by row, which has the same numbers at the same indices."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        return replace(out, scales=out.scales.contiguous()) if how.format is QuantFormat.FP8_GROUP else out


@caught_by("fused_quant::test_values[bfloat16-2-ranks-nvfp4]")
class NibblesSwapped(Honest):
    """The even element is in the high half."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        return replace(out, values=out.values >> 4 | out.values << 4) if how.format is QuantFormat.NVFP4 else out


@caught_by("fused_quant::test_values[float16-2-ranks-nvfp4]")
class ScalesNotSwizzled(Honest):
    """Scales of blocks are stored row by row."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.NVFP4:
            return out
        blocks = norm.shape[-1] // 16
        tokens = norm.numel() // norm.shape[-1]
        scales = torch.zeros_like(out.scales)
        scales[: tokens * blocks] = out.scales[swizzled_offsets(tokens, blocks).reshape(-1)]
        return replace(out, scales=scales)


@caught_by("fused_quant::test_values[float32-2-ranks-nvfp4]")
class PaddingNotCleared(Honest):
    """What is stored for tokens and blocks that there are none of is left over."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.NVFP4:
            return out
        scales = torch.full_like(out.scales, 255)
        used = swizzled_offsets(norm.numel() // norm.shape[-1], norm.shape[-1] // 16).reshape(-1)
        scales[used] = out.scales[used]
        return replace(out, scales=scales)


@caught_by("fused_quant::test_calls_that_follow_each_other[float32-2-ranks-fp8_token]")
class StaleScales(Honest):
    """The scales are those of the last call of the same shape, where that was not long ago."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.FP8_TOKEN or norm.shape != (3, 256):
            return out
        last, self.last = getattr(self, "last", None), out.scales
        return out if last is None else replace(out, scales=last)


@caught_by("fused_quant::test_calls_that_follow_each_other[bfloat16-2-ranks-fp8_token]")
class HandsOutItsScales(Honest):
    """The scales of all calls are in one memory."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is not QuantFormat.FP8_TOKEN:
            return out
        own = self.buffer("scales", out.scales.numel(), torch.float32).view(out.scales.shape)
        return replace(out, scales=own.copy_(out.scales))


class _Quant(Honest):
    """Wrong in the whole call."""

    def all_reduce_rms_norm_quant(self, *args: Any) -> Any:
        return self.changed(super().all_reduce_rms_norm_quant(*args), *args)

    def changed(self, result: Any, tensor: Tensor, residual: Tensor, *args: Any) -> Any:
        raise NotImplementedError


@caught_by("fused_quant::test_values[float64-2-ranks-fp8_static]")
class ResidualNotUpdated(_Quant):
    """The new residual is the old one."""

    def changed(self, result: Any, tensor: Tensor, residual: Tensor, *args: Any) -> Any:
        return *result[:2], residual.clone()


@caught_by("fused_quant::test_values[float64-2-ranks-fp8_token]")
class KeepNormIgnored(_Quant):
    """The norm is always given."""

    def all_reduce_rms_norm_quant(self, *args: Any) -> Any:
        return super(_Quant, self).all_reduce_rms_norm_quant(*args[:-1], True)


@caught_by("fused_quant::test_values[float64-2-ranks-fp8_group]")
class WeightBiasForgotten(Honest):
    """The values are those of a weight without its bias, the norm beside them is right."""

    def all_reduce_rms_norm_quant(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        how: Quantization,
        keep_norm: bool,
    ) -> tuple[Quantized, Tensor | None, Tensor]:
        _, norm, total = super().all_reduce_rms_norm_quant(tensor, residual, weight, eps, weight_bias, how, keep_norm)
        plain, _ = add_rms_norm(torch.zeros_like(total), total, weight, eps, 0.0)
        return self.quantized(plain, how), norm, total


@caught_by("fused_quant::test_values[bfloat16-2-ranks-fp8_token]")
class NormNotRounded(Honest):
    """The norm is quantised before it is rounded to its dtype."""

    def all_reduce_rms_norm_quant(
        self,
        tensor: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        weight_bias: float,
        how: Quantization,
        keep_norm: bool,
    ) -> tuple[Quantized, Tensor | None, Tensor]:
        out, norm, total = super().all_reduce_rms_norm_quant(tensor, residual, weight, eps, weight_bias, how, keep_norm)
        if how.format is QuantFormat.FP8_TOKEN and total.dtype is torch.bfloat16:
            wide, _ = add_rms_norm(torch.zeros_like(total).float(), total.float(), weight.float(), eps, weight_bias)
            values = (wide / out.scales).clamp(-448, 448).to(torch.float8_e4m3fn)
            out = replace(out, values=values)
        return out, norm, total


@caught_by("fused_quant::test_values[float16-3-ranks-fp8_static]")
class RankDependentRounding(Honest):
    """Rank 0 divides by the scale, the others multiply by what is close to its reciprocal."""

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        if how.format is QuantFormat.FP8_STATIC and self.rank and norm.numel() > LARGE:
            codes = out.values.view(torch.uint8).clone()
            codes.view(-1)[0] ^= 1  # as a tie that goes the other way
            out = replace(out, values=codes.view(torch.float8_e4m3fn))
        return out


@caught_by("fused_quant::test_any_layout[bfloat16-2-ranks-fp8_group]")
class ReadsAcrossStrides(Honest):
    """The residual is read as if it were contiguous."""

    def all_reduce_rms_norm_quant(self, tensor: Tensor, residual: Tensor, *args: Any) -> Any:
        dense = torch.as_strided(residual, residual.shape, torch.empty(residual.shape).stride())
        return super().all_reduce_rms_norm_quant(tensor, dense, *args)


@caught_by("fused_quant::test_orthogonal_groups_of_equal_size[4-ranks-fp8_token]")
class QuantOfTheFirstGroup(Honest):
    """The first group of each size in a process adds for all others of that size, in this call alone."""

    first: ClassVar[dict[int, Any]] = {}

    def all_reduce_rms_norm_quant(self, *args: Any) -> Any:
        mine, self._pg = self._pg, self.first.setdefault(self.n, self._pg)
        try:
            return super().all_reduce_rms_norm_quant(*args)
        finally:
            self._pg = mine


@caught_by("fused_quant::test_replays_see_new_contents[2-ranks-fp8_token]")
class StaleScalesOnReplay(Honest):
    """The scales of a captured call are those of the capture."""

    capturing = False

    def capture_begin(self) -> None:
        self.capturing = True

    def capture_end(self, bootstrap: Any) -> None:
        self.capturing = False

    def quantized(self, norm: Tensor, how: Quantization) -> Quantized:
        out = super().quantized(norm, how)
        kept = self.__dict__.setdefault("kept", {})
        if how.format is QuantFormat.FP8_TOKEN and self.capturing:
            kept[norm.shape] = out.scales.clone()
        return replace(out, scales=kept.get(norm.shape, out.scales).clone()) if how.format is QuantFormat.FP8_TOKEN else out


@caught_by("fused_quant::test_values[float32-2-ranks-fp8_token]")
class RowsOfTheSum(Honest):
    """The scale is that of the new residual, not of the norm."""

    def all_reduce_rms_norm_quant(self, tensor: Tensor, residual: Tensor, *args: Any) -> Any:
        out, norm, total = super().all_reduce_rms_norm_quant(tensor, residual, *args)
        how = args[3]
        return (replace(out, scales=quantize(total, how).scales) if how.format is QuantFormat.FP8_TOKEN else out), norm, total
