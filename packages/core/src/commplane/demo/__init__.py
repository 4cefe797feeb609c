"""A small decoder-only transformer with paged keys and values, for demonstrations and tests of what moves or caches pages.

Its weights are seeded, not trained: what it writes means nothing, but every token depends on all tokens before it. All of its
sums are exact (`commplane.demo.exact`), so the same tokens and the same pages, bit for bit, come out however the work is cut: in
one go or in pieces, from cached pages or not, on one rank or on TP x CP ranks, here or on another machine.

    config = ModelConfig()
    model = Transformer(config, Shard(tp_rank, tp_size), tp_sum=tp.all_reduce_)
    cache = PagedKV(config.layout(tp_size), memory)  # any memory of `nbytes`, also one that a transfer engine gave
    token = model.prefill(prompt, cache, pages)      # the first new token
    token = model.decode(token, len(prompt), cache, pages)

Importing this imports torch; ``import commplane`` does not.
"""

from __future__ import annotations

from commplane.demo.config import ModelConfig, Shard
from commplane.demo.generate import alone, decode_text, encode_text
from commplane.demo.layout import PageLayout
from commplane.demo.pages import PagedKV
from commplane.demo.transformer import Transformer

__all__ = ["ModelConfig", "PageLayout", "PagedKV", "Shard", "Transformer", "alone", "decode_text", "encode_text"]
