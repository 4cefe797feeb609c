"""Where the parts of a page lie, in bytes.

A page holds the keys and values of `page_tokens` consecutive tokens, float32, as

    [layer][kv head][k, v][token][head_dim]

so a range of layers (pipeline parallel) is one run of bytes, and a range of heads (tensor parallel) is one run in each layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from commplane.errors import ConfigError

__all__ = ["PageLayout"]

_FLOAT32 = 4


@dataclass(frozen=True)
class PageLayout:
    """The layout of one rank's pages; all counts are this rank's."""

    layers: int
    kv_heads: int
    page_tokens: int
    head_dim: int

    @property
    def head_bytes(self) -> int:
        """Keys and values of one head in one layer."""
        return 2 * self.page_tokens * self.head_dim * _FLOAT32

    @property
    def layer_bytes(self) -> int:
        """All heads of one layer."""
        return self.kv_heads * self.head_bytes

    @property
    def page_bytes(self) -> int:
        """One page."""
        return self.layers * self.layer_bytes

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of one page, as float32."""
        return (self.layers, self.kv_heads, 2, self.page_tokens, self.head_dim)

    def spans(self, layers: tuple[int, int] | None = None, heads: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """Where layers ``[a, b)`` and heads ``[c, d)`` of a page lie: (offset in the page, size), in bytes.

        Counted from this rank's first layer and head; None takes all. Runs that touch are one, and the order is ascending, so
        two layouts with the same parts give runs of the same bytes in the same order if they are cut alike (`pieces`).
        """
        merged: list[tuple[int, int]] = []
        for offset, size in self.pieces(layers, heads):
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((offset, size))
        return merged

    def pieces(self, layers: tuple[int, int] | None = None, heads: tuple[int, int] | None = None) -> Iterator[tuple[int, int]]:
        """As `spans`, one run for each layer: lists of two layouts fit each other piece by piece, whatever else they hold."""
        (first, last), (low, high) = layers or (0, self.layers), heads or (0, self.kv_heads)
        if not (0 <= first <= last <= self.layers and 0 <= low <= high <= self.kv_heads):
            raise ConfigError(
                f"page: layers [{first}, {last}) and heads [{low}, {high}) must lie in {self.layers} layers "
                f"and {self.kv_heads} heads"
            )
        for layer in range(first, last):
            yield layer * self.layer_bytes + low * self.head_bytes, (high - low) * self.head_bytes
