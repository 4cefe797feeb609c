"""Keys and values in pages of memory that the caller gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from commplane.demo.layout import PageLayout
from commplane.errors import ConfigError

__all__ = ["PagedKV"]


class PagedKV:
    """A pool of pages: page i is the bytes ``[i * page_bytes, (i + 1) * page_bytes)`` of `memory`.

    Args:
        layout: of each page.
        memory: writable bytes, or a contiguous tensor on the CPU; stays the caller's, and is neither zeroed nor freed here. A
            tail that is too short for a page is left alone.
    """

    def __init__(self, layout: PageLayout, memory: memoryview | bytearray | Tensor) -> None:
        flat = memory.view(torch.uint8).flatten() if isinstance(memory, Tensor) else torch.frombuffer(memory, dtype=torch.uint8)
        self.layout, self.capacity = layout, flat.numel() // layout.page_bytes
        if not self.capacity:
            raise ConfigError(f"page pool: wanted room for a page of {layout.page_bytes} bytes, found {flat.numel()} bytes")
        self.bytes = flat[: self.capacity * layout.page_bytes].view(self.capacity, layout.page_bytes)
        """The pool as ``[page][byte]``."""
        self.values = self.bytes.view(torch.float32).view(self.capacity, *layout.shape)
        """The pool as ``[page][layer][kv head][k, v][token][head_dim]``."""

    def write(self, layer: int, pages: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values ``[token, kv head, head_dim]`` of tokens that lie in `slots` of `pages`, one of each for each token."""
        block = self.values[:, layer]
        block[pages, :, 0, slots] = keys.to(torch.float32)
        block[pages, :, 1, slots] = values.to(torch.float32)

    def read(self, layer: int, pages: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `tokens` tokens of `pages`: two of ``[kv head, token, head_dim]``, float64."""
        block = self.values[:, layer].index_select(0, pages)  # [page, kv head, k/v, token, head_dim]
        both = block.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :tokens].to(torch.float64)
        return both[0], both[1]

    def copy(self, pages: Sequence[int]) -> Tensor:
        """The bytes of `pages`, ``[page][byte]``: a copy, to be compared or kept."""
        return self.bytes[list(pages)].clone()
