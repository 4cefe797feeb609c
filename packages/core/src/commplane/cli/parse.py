"""What users may write for sizes and dtypes."""

from __future__ import annotations

import argparse
import re

__all__ = ["DTYPE_ALIASES", "parse_size"]

DTYPE_ALIASES = {
    "f32": "float32",
    "fp32": "float32",
    "f64": "float64",
    "fp64": "float64",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "half": "float16",
}

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def parse_size(text: str) -> int:
    """``64``, ``64B``, ``8K``, ``64KiB``, ``1MB`` as bytes; K, M and G are powers of 1024."""
    match = re.fullmatch(r"(\d+)\s*(?:([KMG])I?)?B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"wanted a size such as 64, 8K or 1M, found {text!r}")
    return int(match[1]) * _UNITS[match[2] or ""]
