"""FlashInfer's fusion patterns: their numbers, what each writes, and which algorithm a message goes by. Pure; imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

from commplane.api import QuantFormat

__all__ = ["ALL_REDUCE", "NORM", "QUANTISED", "SWIZZLED_128X4", "Pattern", "one_shot_limit", "plan_shape"]

ALL_REDUCE = 0
"""The sum alone, into `output`."""
NORM = 1
"""Writes `residual_out` and `norm_out`."""
SWIZZLED_128X4 = 0
"""The layout of NVFP4's scales that `commplane.api.quantize.swizzled_offsets` describes. The kernels write no scales in 8x4."""


@dataclass(frozen=True)
class Pattern:
    """The pattern of a quantised norm. All write `residual_out`, `quant_out` and, but for a static scale, `scale_out`.

    Attributes:
        alone: its number where the norm itself is not wanted; `norm_out` is then not written, and must not be given: FlashInfer
            would return it all the same.
        with_norm: its number where `norm_out` is written too.
    """

    alone: int
    with_norm: int


QUANTISED = {
    QuantFormat.FP8_STATIC: Pattern(2, 4),
    QuantFormat.NVFP4: Pattern(3, 5),
    QuantFormat.FP8_GROUP: Pattern(8, 9),
    QuantFormat.FP8_TOKEN: Pattern(10, 11),
}

# Rows that a plain sum is cut into, largest first.
_HIDDEN_SIZES = (4096, 2048, 1024, 512, 256)
# Up to which a message of whole vectors may be one row: 1024 threads of 16 bytes, which every number of vectors has a launch for.
_ONE_ROW_BYTES, _VECTOR_BYTES = 16384, 16

_KIB, _MIB = 1 << 10, 1 << 20
# The largest message in bytes that goes by one-shot under `auto`, for each major compute capability and number of ranks. Those of
# 9 and 10 are what vLLM ships; on 2 x H200 the one-shot was the faster at all sizes up to 32 MiB. 12 and 16 ranks: as its
# neighbour, not measured.
_ONE_SHOT_BYTES = {
    9: {2: 32 * _MIB, 4: 2 * _MIB, 8: 512 * _KIB, 16: 256 * _KIB},
    10: {2: 32 * _MIB, 4: 4 * _MIB, 8: 1 * _MIB, 16: 512 * _KIB},
    12: {2: 32 * _MIB, 4: 2 * _MIB, 8: 512 * _KIB, 16: 256 * _KIB},
}


def one_shot_limit(algorithm: str, most: int, world_size: int, major: int) -> int:
    """The largest message in bytes that goes by one-shot, 0 for none, where `most` is the largest of all.

    Args:
        algorithm: auto, one_shot or two_shot.
        most: bytes.
        world_size: 2, 4, 8 or 16.
        major: of the compute capability.
    """
    if algorithm != "auto":
        return most if algorithm == "one_shot" else 0
    return min(_ONE_SHOT_BYTES.get(major, _ONE_SHOT_BYTES[9])[world_size], most)


def plan_shape(count: int, itemsize: int, world_size: int, one_shot: bool) -> tuple[int, int, bool]:
    """Tokens, hidden size and whether it is a one-shot, for the sum of `count` elements of `itemsize` bytes.

    The hidden size is the largest that divides `count`; else a short message is one row, and another is padded to whole rows of
    the smallest, through a copy. A two-shot wants more tokens than ranks: of fewer, smaller rows are tried, and then it is a
    one-shot.
    """
    smallest, nbytes = _HIDDEN_SIZES[-1], count * itemsize
    # Not below the smallest row: the threads of a launch also clear what a message before it has used, which may be a large one.
    if one_shot and smallest < count and nbytes % _VECTOR_BYTES == 0 and nbytes <= _ONE_ROW_BYTES and count % smallest:
        return 1, count, True
    whole = -(-count // smallest) * smallest
    fitting = [h for h in _HIDDEN_SIZES if whole % h == 0]
    if not one_shot:
        fit = next((h for h in fitting if whole // h > world_size), None)
        if fit is not None:
            return whole // fit, fit, False
    return whole // fitting[0], fitting[0], True
