"""Arithmetic whose sums are exact in float64, so no order of additions, and no way of cutting them, can change a bit.

Every value is rounded to a grid (a multiple of a power of two) and held below a bound. A product of two such values, and a sum of
many, then needs fewer than the 53 bits that a float64 has, and is what real arithmetic gives, on any machine, with any number of
threads or ranks, by any BLAS. What is not a sum is computed element by element from equal inputs and rounded again.

The bounds, in bits (grid, magnitude), for the largest sizes that `ModelConfig` allows:

    weights                2^-12, 2^0      norm of x   2^-12, 2^5 (sqrt(hidden))    x       2^-12, 2^6
    projections            2^-24, 2^15     keys, queries 2^-10, 2^3.5               values  2^-12, 2^4
    sum of x * x           2^-24, 2^22     scores      2^-20, 2^14                  exp     2^-12, 2^9
    sum of exp * value     2^-24, 2^28     MLP's inner 2^-12, 2^8                   its sum 2^-24, 2^20
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ANGLES", "GRID", "angles", "attention_weights", "rms_norm", "rotate", "silu", "snap"]

GRID = 12
"""Values lie on multiples of ``2 ** -GRID`` unless said otherwise."""
ANGLES = 10
"""The same for keys and queries."""
_GATE = 8
"""The same for what goes into `silu`, so that its inputs are few enough to be tested one by one."""
_SCORE = 8
"""The same for attention scores, for the same reason."""
SCORE_LIMIT = 6.0
"""Scores are held below this. Keys and queries are normalised, so few reach it, and exp needs no shift by a maximum: the softmax
over pages of several ranks is a plain sum of numerators and denominators."""
_EPSILON = 2.0**-20


def snap(x: Tensor, bits: int = GRID, limit: float = 64.0) -> Tensor:
    """`x` rounded to multiples of ``2 ** -bits``, within ``[-limit, limit]``. In place."""
    return x.mul_(2.0**bits).round_().mul_(2.0**-bits).clamp_(-limit, limit)


def rms_norm(x: Tensor, gain: Tensor | None = None, bits: int = GRID) -> Tensor:
    """`x` divided by the root of its mean square over the last dimension, times `gain`."""
    mean = (x * x).sum(-1, keepdim=True).div_(x.shape[-1])
    y = x / torch.sqrt(mean.add_(_EPSILON))  # not rsqrt: IEEE 754 fixes the bits of a root and of a quotient
    return snap(y if gain is None else y.mul_(gain), bits)


def angles(tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions ``0..tokens-1``: two of ``[token, head_dim / 2]``."""
    # By the C library one by one: torch's own sines differ with the width of the machine's vectors.
    half = head_dim // 2
    table = [[position * 10000.0 ** (-i / half) for i in range(half)] for position in range(tokens)]
    cosines = torch.tensor([[math.cos(a) for a in row] for row in table], dtype=torch.float64)
    sines = torch.tensor([[math.sin(a) for a in row] for row in table], dtype=torch.float64)
    return snap(cosines), snap(sines)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary positions: ``[token, head, head_dim]`` turned by tables ``[token, head_dim / 2]``."""
    cosines, sines = cosines[:, None], sines[:, None]
    a, b = x.chunk(2, dim=-1)
    return snap(torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1), ANGLES)


def attention_weights(scores: Tensor) -> Tensor:
    """Exp of `scores`, not yet divided by their sum. In place."""
    return snap(snap(scores, _SCORE, SCORE_LIMIT).exp_(), limit=2.0**9)


def silu(gate: Tensor) -> Tensor:
    """``gate * sigmoid(gate)`` of values that are held within 16. In place."""
    gate = snap(gate, _GATE, 16.0)
    return snap(gate * torch.sigmoid(gate))
