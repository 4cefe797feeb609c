"""The model: RMSNorm, rotary positions, grouped-query attention with normalised keys and queries, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from commplane.demo import exact
from commplane.demo.config import ModelConfig, Shard
from commplane.demo.pages import PagedKV
from commplane.demo.weights import LayerWeights, Weights
from commplane.errors import ConfigError

__all__ = ["Transformer"]

Sum = Callable[[Tensor], object]
"""Sums a contiguous float64 tensor over a group, in place: ``communicator.all_reduce_``. Any order of additions will do."""

_PRINTABLE = slice(32, 127)
"""Only these bytes are answered, so that answers can be shown."""


class Transformer:
    """This rank's part of the model. Greedy: the most likely token, the lowest one where several are equally likely.

    `prefill` and `decode` are collective over the TP ranks and the CP ranks of `shard`, which must call them with the same
    tokens; each has its own pool and its own pages. All ranks get the same token.

    Args:
        config: the same on all ranks.
        shard: this rank's part.
        tp_sum: sums over the TP ranks; two calls a layer. None only if there is one.
        cp_sum: sums over the CP ranks, which have the same TP rank; one call a layer. None only if there is one.
        chunk: tokens that a prefill computes at once; it changes no result.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard | None = None,
        *,
        tp_sum: Sum | None = None,
        cp_sum: Sum | None = None,
        chunk: int = 64,
    ) -> None:
        self.config, self.shard, self.chunk = config, shard or Shard(), chunk
        config.check(self.shard.tp_size)
        if (tp_sum is None and self.shard.tp_size > 1) or (cp_sum is None and self.shard.cp_size > 1):
            raise ConfigError(f"demo model: {self.shard} needs a sum over each kind of its ranks; pass tp_sum and cp_sum")
        self.tp_sum, self.cp_sum = tp_sum, cp_sum
        self.weights = Weights(config, self.shard)
        self.computed = 0
        """Tokens run through the layers so far: what a cache saves shows here."""

    def message_bytes(self, tokens: int | None = None) -> tuple[int, int]:
        """Largest message of `tp_sum` and of `cp_sum` when `tokens` (default: a whole chunk) are computed at once."""
        rows, config = tokens or self.chunk, self.config
        return rows * config.hidden * 8, rows * config.heads // self.shard.tp_size * (config.head_dim + 1) * 8

    def prefill(self, tokens: Sequence[int], cache: PagedKV, pages: Sequence[int], start: int = 0) -> int:
        """The token that follows `tokens`; keys and values of positions `start` and on are written.

        Args:
            tokens: the whole sequence, from position 0.
            cache: this rank's pool.
            pages: of this sequence in the pool, in order; with CP, this rank's own ones. They must have room for all tokens.
            start: positions before it are in the pages already. At most ``len(tokens) - 1``: the last token must be computed for
                what follows it. Where its page is shared, the bits that are written are those that are there.
        """
        if not 0 <= start < len(tokens):
            raise ConfigError(f"prefill: start must lie in 0..{len(tokens) - 1} for {len(tokens)} tokens, found {start}")
        x = torch.empty(0)
        for first in range(start, len(tokens), self.chunk):
            x = self._forward(tokens[first : first + self.chunk], first, cache, pages)
        return self._sample(x[-1])

    def decode(self, token: int, position: int, cache: PagedKV, pages: Sequence[int]) -> int:
        """The token that follows `token`, which lies at `position`; its keys and values are written."""
        return self._sample(self._forward([token], position, cache, pages)[-1])

    def generate(self, tokens: Sequence[int], count: int, cache: PagedKV, pages: Sequence[int], start: int = 0) -> list[int]:
        """`count` new tokens: one `prefill`, then `decode`. The pages need room for ``len(tokens) + count - 1`` tokens."""
        answer = [self.prefill(tokens, cache, pages, start)]
        while len(answer) < count:
            answer.append(self.decode(answer[-1], len(tokens) + len(answer) - 1, cache, pages))
        return answer

    def _forward(self, tokens: Sequence[int], first: int, cache: PagedKV, pages: Sequence[int]) -> Tensor:
        config, shard, end = self.config, self.shard, first + len(tokens)
        needed = config.pages(end, shard)
        if end > config.max_tokens or len(pages) < needed:
            raise ConfigError(
                f"demo model: {end} tokens need {needed} pages and max_tokens {end}, found {len(pages)} and {config.max_tokens}"
            )
        if cache.layout != config.layout(shard.tp_size):
            raise ConfigError(f"demo model: pages must be laid out as {config.layout(shard.tp_size)}, found {cache.layout}")
        self.computed += len(tokens)
        step = _Step(config, shard, cache, torch.tensor(pages[:needed], dtype=torch.int64), first, end)
        x = self.weights.embedding[torch.tensor(tokens, dtype=torch.int64)].clone()
        for index, layer in enumerate(self.weights.layers):
            x = exact.snap(x + self._summed(self._attention(index, layer, x, step)))
            x = exact.snap(x + self._summed(_mlp(layer, x)))
        return x

    def _attention(self, index: int, layer: LayerWeights, x: Tensor, step: _Step) -> Tensor:
        width, rows, group = self.config.head_dim, x.shape[0], self.config.heads // self.config.kv_heads
        qkv = (exact.rms_norm(x, layer.attention_gain) @ layer.qkv).view(rows, -1, width)
        kv_heads = step.cache.layout.kv_heads
        query, key, value = qkv[:, : -2 * kv_heads], qkv[:, -2 * kv_heads : -kv_heads], qkv[:, -kv_heads:]
        cosines, sines = self.weights.cosines[step.first : step.end], self.weights.sines[step.first : step.end]
        query = exact.rotate(exact.rms_norm(query), cosines, sines)
        key = exact.rotate(exact.rms_norm(key), cosines, sines)
        step.cache.write(index, step.page, step.slot, key[step.own], exact.snap(value[step.own], limit=16.0))
        keys, values = step.cache.read(index, step.pages, step.held)
        # [kv head, queries of its group x row, head_dim]; the rows of one query head lie together
        grouped = query.view(rows, kv_heads, group, width).permute(1, 2, 0, 3).flatten(1, 2)
        weights = exact.attention_weights((grouped @ keys.transpose(1, 2)).mul_(2.0 / width**0.5))
        weights.view(kv_heads, group, rows, keys.shape[1]).mul_(step.visible)
        sums = torch.cat([weights @ values, weights.sum(-1, keepdim=True)], dim=-1)
        if self.cp_sum is not None:
            self.cp_sum(sums)
        attended = exact.snap(sums[..., :-1] / sums[..., -1:], limit=16.0)
        attended = attended.view(kv_heads, group, rows, width).permute(2, 0, 1, 3).reshape(rows, -1)
        return attended @ layer.attention_out

    def _summed(self, partial: Tensor) -> Tensor:
        if self.tp_sum is not None:
            self.tp_sum(partial)
        return partial

    def _sample(self, x: Tensor) -> int:
        logits = exact.rms_norm(x, self.weights.last_gain) @ self.weights.head
        likely = logits[_PRINTABLE]
        return _PRINTABLE.start + int((likely == likely.max()).nonzero()[0])  # argmax leaves open which of equals it takes


def _mlp(layer: LayerWeights, x: Tensor) -> Tensor:
    gate, up = (exact.rms_norm(x, layer.mlp_gain) @ layer.gate_up).chunk(2, dim=-1)
    return exact.snap(exact.silu(gate.clone()) * exact.snap(up.clone(), limit=16.0), limit=256.0) @ layer.down


class _Step:
    """Positions ``[first, end)`` of one sequence on this rank: where they are written, and what each of them may see."""

    def __init__(self, config: ModelConfig, shard: Shard, cache: PagedKV, pages: Tensor, first: int, end: int) -> None:
        size = config.page_tokens
        self.cache, self.pages, self.first, self.end = cache, pages, first, end
        positions = torch.arange(first, end)
        logical = positions // size
        self.own = logical % shard.cp_size == shard.cp_rank
        """Which of the positions lie on this CP rank."""
        self.page, self.slot = pages[logical[self.own] // shard.cp_size], positions[self.own] % size
        mine = torch.arange(shard.cp_rank, shard.cp_rank + len(pages) * shard.cp_size, shard.cp_size)
        held = (mine[:, None] * size + torch.arange(size)).flatten()  # the position of each token in `pages`
        held = held[held < end]  # what lies behind them in the last page may be anything
        self.held = len(held)
        """Tokens of `pages`, from the first one on, that are written."""
        self.visible = (held[None, :] <= positions[:, None]).to(torch.float64)
        """``[row, held token]``: 1 where the row sees the token."""
