"""Sizes and shapes that the tests go through."""

from __future__ import annotations

__all__ = ["GROW_AND_SHRINK", "sizes"]

# Elements. Around vector widths, cache lines and chunk sizes, and odd.
_QUICK = (0, 1, 7, 64, 1023, 40_007, 300_000)
_FULL = (2, 3, 15, 16, 17, 31, 255, 4096, 4097, 65_535, 65_537, 1_048_573, 3_000_000)

GROW_AND_SHRINK = (1, 1000, 10, 100_000, 3, 70_001, 0, 64, 100_000, 2)
"""Elements of calls that follow each other on one communicator: a buffer that has grown still holds what came before."""


def sizes(full: bool) -> tuple[int, ...]:
    """Numbers of elements."""
    return _QUICK + _FULL if full else _QUICK
