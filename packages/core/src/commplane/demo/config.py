"""The shape of the model and which part of it a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from commplane.demo.layout import PageLayout
from commplane.errors import ConfigError

__all__ = ["ModelConfig", "Shard"]


@dataclass(frozen=True)
class Shard:
    """Which part of the model and of the pages a rank has.

    Attributes:
        tp_rank, tp_size: tensor parallel: heads and inner features are cut over these ranks.
        cp_rank, cp_size: context parallel: logical page p of a sequence (its tokens p * page_tokens and on) lies on CP rank
            ``p % cp_size`` and nowhere else. Every CP rank computes all tokens and attends to its own pages.
    """

    tp_rank: int = 0
    tp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1

    def __post_init__(self) -> None:
        for kind, rank, size in (("tp", self.tp_rank, self.tp_size), ("cp", self.cp_rank, self.cp_size)):
            if not 0 <= rank < size:
                raise ConfigError(f"shard: {kind}_rank must lie in 0..{size - 1} for {kind}_size {size}, found {rank}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; equal configurations have equal weights.

    Attributes:
        layers, hidden, inner: decoder layers, width of the residual stream, width of the MLP.
        heads, kv_heads, head_dim: query heads, key and value heads (grouped-query attention), features of a head.
        page_tokens: tokens in a page of keys and values.
        max_tokens: longest sequence, prompt and answer together.
        seed: of the weights.
    """

    layers: int = 4
    hidden: int = 256
    inner: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    page_tokens: int = 16
    max_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        # Up to these sizes every sum is exact, see commplane.demo.exact.
        for name, limit in (("hidden", 1024), ("inner", 4096), ("heads", 32), ("head_dim", 128), ("max_tokens", 32768)):
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(f"demo model: {name} must lie in 1..{limit}, found {getattr(self, name)}")
        if min(self.layers, self.page_tokens, self.kv_heads) < 1 or self.heads % self.kv_heads or self.head_dim % 2:
            raise ConfigError(f"demo model: heads must be a multiple of kv_heads, head_dim even and no size 0, found {self}")

    def check(self, tp_size: int) -> None:
        """Refuse a number of TP ranks that the heads or the MLP cannot be cut into.

        Raises:
            ConfigError: with the numbers.
        """
        if self.kv_heads % tp_size or self.inner % tp_size:
            raise ConfigError(
                f"demo model: {tp_size} tp ranks must divide {self.kv_heads} kv heads and {self.inner} inner features; "
                "take fewer ranks or another model"
            )

    def layout(self, tp_size: int = 1) -> PageLayout:
        """Of the pages on each of `tp_size` ranks: all layers, this rank's part of the kv heads."""
        self.check(tp_size)
        return PageLayout(self.layers, self.kv_heads // tp_size, self.page_tokens, self.head_dim)

    def pages(self, tokens: int, shard: Shard | None = None) -> int:
        """Pages that `tokens` tokens take on the rank of `shard`: with CP, its own ones only."""
        logical = -(-tokens // self.page_tokens)
        return len(range(shard.cp_rank, logical, shard.cp_size)) if shard else logical
