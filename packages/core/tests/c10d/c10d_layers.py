"""A small model for tests of what trains and serves models over a process group; its numbers are exact in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["Mlp", "batches", "steps"]


class Mlp(torch.nn.Module):
    """Up, activation, down, twice."""

    def __init__(self, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)
        self.up2, self.down2 = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(F.silu(self.up(x)))
        return x + self.down2(F.silu(self.up2(x)))


def batches(rank: int, count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Other ones on each rank, the same in each run."""
    generator = torch.Generator().manual_seed(rank + 11)
    return [torch.randn(4, 8, generator=generator).to(dtype) for _ in range(count)]


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> list[float]:
    """Train; the losses."""
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
