"""Seeded weights: whole numbers drawn by torch's generator, so equal on every machine, cut to this rank's part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from commplane.demo import exact
from commplane.demo.config import ModelConfig, Shard

__all__ = ["LayerWeights", "Weights"]

_VOCABULARY = 256


@dataclass(frozen=True)
class LayerWeights:
    """One layer's, float64, on the grid: matrices ``[in, out]`` below 1 and cut to this rank, gains below 2 and whole."""

    attention_gain: Tensor
    qkv: Tensor
    attention_out: Tensor
    mlp_gain: Tensor
    gate_up: Tensor
    down: Tensor


class Weights:
    """All weights of this rank. Embedding and head are whole on each rank."""

    def __init__(self, config: ModelConfig, shard: Shard) -> None:
        self._generator = torch.Generator().manual_seed(config.seed)
        width, group = config.head_dim, config.heads // config.kv_heads
        kv_heads, inner = config.kv_heads // shard.tp_size, config.inner // shard.tp_size
        heads = slice(shard.tp_rank * kv_heads, (shard.tp_rank + 1) * kv_heads)
        part = slice(shard.tp_rank * inner, (shard.tp_rank + 1) * inner)
        # The attention is given more weight than the embedding and the MLP, so that one wrong page shows in the answer.
        self.embedding = self._draw(0.25, _VOCABULARY, config.hidden)
        self.cosines, self.sines = exact.angles(config.max_tokens, width)
        self.layers = []
        for _ in range(config.layers):
            # Drawn whole on every rank, so that the numbers do not depend on how they are cut.
            query = self._draw(0.1, config.hidden, config.kv_heads, group * width)
            key, value = self._draw(0.1, 2, config.hidden, config.kv_heads, width)
            out = self._draw(0.4, config.kv_heads, group * width, config.hidden)
            gate, up = self._draw(0.1, 2, config.hidden, config.inner)
            down = self._draw(0.2, config.inner, config.hidden)
            self.layers.append(
                LayerWeights(
                    attention_gain=self._gain(config.hidden),
                    qkv=torch.cat([w[:, heads].flatten(1) for w in (query, key, value)], dim=1),
                    attention_out=out[heads].flatten(0, 1).clone(),
                    mlp_gain=self._gain(config.hidden),
                    gate_up=torch.cat([gate[:, part], up[:, part]], dim=1),
                    down=down[part].clone(),
                )
            )
        self.last_gain = self._gain(config.hidden)
        self.head = self._draw(0.1, config.hidden, _VOCABULARY)

    def _draw(self, limit: float, *shape: int) -> Tensor:
        """Evenly from the grid within ``[-limit, limit]``, below 1."""
        top = min(round(limit * 2**exact.GRID), 2**exact.GRID - 1)
        return torch.randint(-top, top + 1, shape, generator=self._generator, dtype=torch.float64).mul_(2.0**-exact.GRID)

    def _gain(self, size: int) -> Tensor:
        return self._draw(0.25, size).add_(1.0)
