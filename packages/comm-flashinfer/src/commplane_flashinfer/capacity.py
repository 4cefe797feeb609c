"""What a workspace of FlashInfer's trtllm kernels holds and takes. Pure; the layout was read from flashinfer-python 0.7.2."""

from __future__ import annotations

from typing import Final

from commplane_flashinfer.checks import MOST_BYTES, WORLD_SIZES

__all__ = ["GRANULARITY", "MOST_BYTES", "WORLD_SIZES", "allocations", "largest", "physical", "requests", "rounded", "shape"]

GRANULARITY: Final = 2 << 20
"""Bytes to which the CUDA driver rounds an allocation up."""

_PAD = 2048  # FlashInfer leaves room for signals behind each allocation, used or not
_ROW = 4096  # elements
_FLAGS = 256 * 4  # bytes of barrier flags a rank


def requests(world_size: int, elements: int, itemsize: int) -> tuple[int, int, int]:
    """Bytes of the three buffers as the kernels see them: two-shot staging, flags, and three turns of one-shot staging."""
    span = world_size * elements * itemsize
    return _up(span, 16), _up(world_size * _FLAGS, 16), _up(3 * span, 16)


def allocations(world_size: int, elements: int, itemsize: int, granularity: int = GRANULARITY) -> tuple[int, int, int]:
    """The same as physical memory of one rank."""
    one, flags, three = (_up(n + _PAD, granularity) for n in requests(world_size, elements, itemsize))
    return one, flags, three


def physical(world_size: int, elements: int, itemsize: int, granularity: int = GRANULARITY) -> int:
    """Bytes of device memory that a workspace takes on each rank: about ``4 * world_size * elements * itemsize``."""
    return sum(allocations(world_size, elements, itemsize, granularity))


def largest(world_size: int, itemsize: int) -> int:
    """The most elements of a workspace, in whole rows, for which no offset of the kernels overflows."""
    return MOST_BYTES // (world_size * itemsize) // _ROW * _ROW


def rounded(elements: int) -> int:
    """What to build for messages of `elements`: whole rows, so that one that is padded to them fits too."""
    return _up(elements, _ROW)


def shape(elements: int) -> tuple[int, int]:
    """Tokens and hidden size to ask FlashInfer for: it holds their product against a message, and neither alone."""
    return rounded(elements) // _ROW, _ROW


def _up(n: int, to: int) -> int:
    return -(-n // to) * to
