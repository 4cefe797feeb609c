"""One process with the whole model: what the demo has to come to."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from commplane.demo import PagedKV, Transformer
from commplane_disagg.demo.job import Arrived
from commplane_disagg.demo.parts import CONFIG

__all__ = ["expected"]


def expected(prompts: Sequence[Sequence[int]], tokens: int, decode_tp: int) -> list[dict[int, Arrived]]:
    """For each decode rank what it should have of each room."""
    torch.set_num_threads(1)
    model, layout, heads = Transformer(CONFIG), CONFIG.layout(), CONFIG.kv_heads // decode_tp
    ranks: list[dict[int, Arrived]] = [{} for _ in range(decode_tp)]
    for room, prompt in enumerate(prompts):
        pages = range(CONFIG.pages(len(prompt) + tokens))
        cache = PagedKV(layout, bytearray(len(pages) * layout.page_bytes))
        answer = tuple(model.generate(prompt, tokens, cache, pages))
        for rank, rooms in enumerate(ranks):
            part = cache.values[: len(prompt) // CONFIG.page_tokens, :, rank * heads : (rank + 1) * heads].contiguous()
            rooms[room] = Arrived(tokens=answer, pages=tuple(zlib.crc32(page.numpy().tobytes()) for page in part))
    return ranks
