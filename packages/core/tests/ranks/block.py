"""A transformer layer, split over the ranks of a communicator or whole in one process, from the same weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from commplane import ops

HIDDEN, HEADS, INNER = 16, 4, 32
EPS = 1e-6
SPLIT = {"query": 0, "key": 0, "value": 0, "out": 1, "up": 0, "down": 1}
"""The dimension along which each parameter is cut; the others are whole on every rank."""


class Block(torch.nn.Module):
    """Attention and MLP, column-parallel then row-parallel, each with its RMSNorm before and its residual after.

    Without a communicator it is the whole layer. In float64, so that another order of additions is not seen; float32 where code
    is generated, because that which torch 2.4 and 2.11 generate for attention in float64 on CPU fails.
    """

    def __init__(self, comm: Any = None) -> None:
        super().__init__()
        self.comm = comm
        self.generator = torch.Generator().manual_seed(7)
        self.norm1, self.norm2 = self.parameter(HIDDEN), self.parameter(HIDDEN)
        self.query, self.key, self.value = (self.parameter(HIDDEN, HIDDEN, split=0) for _ in range(3))
        self.out = self.parameter(HIDDEN, HIDDEN, split=1)
        self.up, self.down = self.parameter(INNER, HIDDEN, split=0), self.parameter(HIDDEN, INNER, split=1)

    def parameter(self, *shape: int, split: int | None = None) -> torch.nn.Parameter:
        return torch.nn.Parameter(self.mine(torch.randn(shape, generator=self.generator, dtype=torch.float64), split))

    def mine(self, full: torch.Tensor, split: int | None) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        if split is None or self.comm is None:
            return full.clone()
        return full.chunk(self.comm.world_size, split)[self.comm.rank].clone()

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        heads = (F.linear(x, w).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2) for w in (self.query, self.key, self.value))
        return F.linear(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), self.out)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.gelu(F.linear(x, self.up)), self.down)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (HIDDEN,), weight, EPS)


class TrainingBlock(Block):
    """With the two operators that a tensor-parallel layer needs."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.comm is None else ops.copy_to_group(x, self.comm)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.comm is None else ops.reduce_from_group(x, self.comm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.leave(self.attention(self.enter(self.norm(x, self.norm1))))
        return x + self.leave(self.mlp(self.enter(self.norm(x, self.norm2))))


class InferenceBlock(Block):
    """With the methods of the communicator, the sum fused with what follows it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        partial = self.attention(self.norm(x, self.norm1))
        if self.comm is None:
            x = x + partial
            return x + self.mlp(self.norm(x, self.norm2))
        normed, x = self.comm.all_reduce_rms_norm(partial, x, self.norm2, EPS)
        return x + self.comm.all_reduce_(self.mlp(normed))


def inputs(batch: int, seed: int = 3) -> torch.Tensor:
    """Tokens of a batch, equal on all ranks."""
    return torch.randn(batch, 5, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
