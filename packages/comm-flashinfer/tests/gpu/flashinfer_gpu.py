"""What the tests of this folder share: where they run, sizes that are safe there, and what a fused call has to give."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_numbers import bits, expect, inputs, reduced, ulps
from gpu_ranks import Rank, needs_gpu, sizes
from torch import Tensor

from commplane.api import QuantFormat, Quantization, add_rms_norm
from commplane.api.quantize import misquantized, quantize
from commplane.runtime import Communicator

EPS = 1e-6
# Kernels take reciprocals and roots approximately: one place of a narrow dtype, some of 24 bits.
PLACES = {torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}
MOST = 8 << 20
"""Bytes of the largest tensor of a test."""


def marks() -> list[pytest.MarkDecorator]:
    """The marks of a module of this folder."""
    absent = importlib.util.find_spec("flashinfer") is None
    reason = "wants flashinfer-python: pip install 'commplane-flashinfer[flashinfer]'"
    return [*needs_gpu(), pytest.mark.skipif(absent, reason=reason)]


def groups(most: int = 4) -> list[Any]:
    """A case for each size of a group that FlashInfer has kernels for."""
    return [p for p in sizes(most=most) if p.values[0] in (2, 4, 8)]


def most_bytes(rank: Rank) -> int:
    """The largest tensor that is safe: kernels take blocks for a whole GPU, and ranks that share one must all fit at once."""
    if not rank.shared:
        return MOST
    return 256 << 10 if rank.world_size == 2 else 64 << 10


def shapes(rank: Rank, dtype: torch.dtype, hiddens: list[int], tokens: list[int]) -> Iterator[tuple[int, int]]:
    """Those of tokens x hidden that are safe there."""
    for hidden in hiddens:
        for count in tokens:
            if count * hidden * dtype.itemsize <= most_bytes(rank):
                yield count, hidden


def ready(rank: Rank, dtype: torch.dtype, *, fused: bool = True, **options: Any) -> Communicator:
    """The communicator over all ranks with room for the largest tensor. Collective."""
    comm = rank.comm(**options)
    for collective in ("all_reduce", "all_reduce_rms_norm", "all_reduce_rms_norm_quant") if fused else ("all_reduce",):
        comm.prepare(collective, dtype=dtype, max_bytes=most_bytes(rank))
    return comm


def serves(comm: Communicator, collective: str, nbytes: int, dtype: torch.dtype, op: str = "sum", *, graph: bool = False) -> str:
    """The algorithm of FlashInfer that runs; an AssertionError where it is another backend."""
    answer = comm.plan.explain(collective, nbytes=nbytes, dtype=str(dtype).removeprefix("torch."), op=op, graph=graph)
    assert answer.chosen == "flashinfer", str(answer)
    return answer.algorithm


class Layer:
    """Tensors of one call, equal for one seed on all ranks but for the partial sums, and what the call has to give."""

    def __init__(
        self, rank: Rank, dtype: torch.dtype, tokens: int, hidden: int, seed: int, ranks: list[int] | None = None
    ) -> None:
        members = list(range(rank.world_size)) if ranks is None else ranks
        self.parts = [p.view(tokens, hidden) for p in inputs(rank.world_size, tokens * hidden, dtype, seed, rank.device)]
        self.mine = self.parts[rank.rank]
        before, weight = inputs(2, tokens * hidden, dtype, seed + 1, rank.device)
        self.before, self.weight = before.view(tokens, hidden), weight[:hidden].contiguous()
        self.total = reduced([self.parts[r] for r in members])

    def wanted(self, bias: float = 0.0) -> tuple[Tensor, Tensor]:
        return add_rms_norm(self.total.clone(), self.before, self.weight, EPS, bias)

    def check(self, what: object, norm: Tensor | None, residual: Tensor, bias: float = 0.0) -> None:
        """The new residual has the bits of the reference; the norm is within one place."""
        wanted_norm, wanted = self.wanted(bias)
        expect((what, "residual"), residual, wanted)
        if norm is not None:
            assert norm.dtype == wanted_norm.dtype and norm.shape == wanted_norm.shape, what
            far = ulps(norm, wanted_norm)
            assert far <= PLACES[norm.dtype], (what, "norm", far)


def formats() -> list[str]:
    """Those that this GPU has kernels for."""
    return [str(f) for f in QuantFormat if f is not QuantFormat.NVFP4 or torch.cuda.get_device_capability()[0] >= 10]


def how_to(name: str, device: torch.device) -> Quantization:
    """The format with a scale where it wants one."""
    given = {"fp8_static": 0.05, "nvfp4": 40.0}.get(name)
    scale = None if given is None else torch.tensor([given], dtype=torch.float32, device=device)
    return Quantization(QuantFormat(name), scale)


def check_quantised(what: object, comm: Communicator, layer: Layer, how: Quantization, bias: float = 0.0) -> list[Tensor]:
    """Against the reference of the format, applied to the norm that the same call gave; without that norm the same bits."""
    quantised, norm, residual = comm.all_reduce_rms_norm_quant(
        layer.mine, layer.before, layer.weight, how, EPS, bias, keep_norm=True
    )
    assert norm is not None, what
    layer.check(what, norm, residual, bias)
    problem = misquantized(quantised, quantize(norm, how))
    assert problem is None, (what, problem)
    alone, nothing, again = comm.all_reduce_rms_norm_quant(layer.mine, layer.before, layer.weight, how, EPS, bias)
    assert nothing is None, what
    expect((what, "residual without the norm"), again, residual)
    for name in ("values", "scales"):
        a, b = getattr(alone, name), getattr(quantised, name)
        assert torch.equal(bits(a), bits(b)), (what, name, "differ without the norm")
    return [quantised.values, quantised.scales, norm, residual]
