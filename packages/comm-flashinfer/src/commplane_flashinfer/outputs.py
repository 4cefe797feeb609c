"""What a quantised norm is written to: in the layouts of `commplane.api.Quantized`, as FlashInfer wants them."""

from __future__ import annotations

import torch
from torch import Tensor

from commplane.api import QuantFormat, Quantization

__all__ = ["outputs"]

_SCALES_ROWS, _SCALES_COLUMNS = 128, 4  # what NVFP4's scales are padded to
_FP4_BLOCK = 16


def outputs(how: Quantization, shape: torch.Size, tokens: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values and scales as `Quantized` holds them, and the scales as FlashInfer wants to be given them."""
    hidden, form = shape[-1], how.format
    if form is QuantFormat.NVFP4:
        values = torch.empty((*shape[:-1], hidden // 2), dtype=torch.uint8, device=device)
        rows, columns = -(-tokens // _SCALES_ROWS) * _SCALES_ROWS, -(-(hidden // _FP4_BLOCK) // _SCALES_COLUMNS) * _SCALES_COLUMNS
        # Padding is 0, which the kernel leaves to us.
        make = torch.zeros if (rows, columns) != (tokens, hidden // _FP4_BLOCK) else torch.empty
        scales = make(rows * columns, dtype=torch.uint8, device=device)
        return values, scales, scales
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    if form is QuantFormat.FP8_TOKEN:
        scales = torch.empty((*shape[:-1], 1), dtype=torch.float32, device=device)
        return values, scales, scales.view(tokens, 1)
    if form is QuantFormat.FP8_GROUP:
        column, columns = -(-tokens // 4) * 4, -(-(hidden // how.group) // 4)
        # Whole columns, also the last: a reader may load in steps of four tokens.
        scales = torch.empty_strided((column, columns), (1, column), dtype=torch.int32, device=device)[:tokens]
        return values, scales, scales
    assert how.scale is not None
    return values, how.scale, None
