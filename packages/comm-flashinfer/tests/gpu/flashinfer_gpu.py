"""What the tests of this folder share: where they run, sizes that are safe there, what a fused call has to give, and by whom."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu_numbers import bits, expect, inputs, reduced, ulps
from gpu_ranks import Rank, needs_gpu, sizes
from torch import Tensor

from commplane.api import QuantFormat, Quantization, add_rms_norm
from commplane.api.quantize import misquantized, quantize
from commplane.runtime import Communicator
from commplane_flashinfer.patterns import NORM, QUANTISED

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


LAUNCHED: Counter[tuple[int, bool]] = Counter()
"""FlashInfer's launches in this process since `counting`, by pattern and by whether it was a one-shot."""
FUSED = ("all_reduce", "all_reduce_rms_norm", "all_reduce_rms_norm_quant")


def entry_points() -> Any:
    """The module whose launches are counted."""
    from flashinfer import comm

    return comm


def counting() -> None:
    """Count the launches of backends that are formed from now on. Idempotent."""
    module = entry_points()
    run = module.allreduce_fusion
    if getattr(run, "is_counted", False):
        return

    @functools.wraps(run)
    def counted(*args: Any, **kwargs: Any) -> Any:
        LAUNCHED[kwargs["pattern"], kwargs["use_oneshot"]] += 1
        return run(*args, **kwargs)

    counted.is_counted = True  # type: ignore[attr-defined]
    module.allreduce_fusion = counted


@contextmanager
def by_flashinfer(*patterns: int, one_shot: bool | None = None) -> Iterator[None]:
    """An AssertionError where its kernels of each of `patterns` are not launched inside: another backend has served the call.

    With `one_shot`, launches of the other algorithm are an error too.
    """
    before = LAUNCHED.copy()
    yield
    new = LAUNCHED - before
    for pattern in patterns:
        found = {way: new[pattern, way] for way in (True, False)}
        wanted = found[one_shot] if one_shot is not None else sum(found.values())
        assert wanted, f"wanted launches of pattern {pattern} by flashinfer, found {found} (one-shot: times)"
        assert one_shot is None or not found[not one_shot], f"pattern {pattern}: launches by one-shot are {found}"


def patterns(how: Quantization) -> tuple[int, int]:
    """Of the quantised norm that keeps the norm, and of that which does not."""
    return QUANTISED[how.format].with_norm, QUANTISED[how.format].alone


def room(most: int, **options: Any) -> dict[str, Any]:
    """Settings of a communicator for messages of up to `most` bytes of every dtype, which `prepare` builds the memory for."""
    sizes = {"max_bytes": most, "float32_max_bytes": most, "open_bytes": min(most, 64 << 10)}
    return {**sizes, "max_workspace_bytes": 4 << 30, **options}


def prepared(comm: Communicator, dtype: torch.dtype, most: int) -> Communicator:
    """The same, with a workspace for `most` bytes. Collective."""
    for collective in FUSED:
        comm.prepare(collective, dtype=dtype, max_bytes=most)
        serves(comm, collective, most, dtype, "fp8_static" if collective == FUSED[2] else "sum")
    return comm


def formed(
    rank: Rank, name: str, ranks: list[int] | None = None, *, most: int = 32 << 10, dtype: torch.dtype = torch.bfloat16
) -> Communicator:
    """A new communicator with a workspace for `most` bytes. Collective over `ranks`."""
    counting()
    return prepared(rank.form(name, ranks, **room(most)), dtype, most)


def ready(rank: Rank, dtype: torch.dtype, **options: Any) -> Communicator:
    """The communicator over all ranks with room for the largest tensor. Collective."""
    counting()
    return prepared(rank.comm(**room(most_bytes(rank), **options)), dtype, most_bytes(rank))


def serves(comm: Communicator, collective: str, nbytes: int, dtype: torch.dtype, op: str = "sum", *, graph: bool = False) -> None:
    """An AssertionError where the plan gives the call to another backend."""
    answer = comm.plan.explain(collective, nbytes=nbytes, dtype=str(dtype).removeprefix("torch."), op=op, graph=graph)
    assert answer.chosen == "flashinfer", str(answer)


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


def check_quantised(
    what: object, comm: Communicator, layer: Layer, how: Quantization, bias: float = 0.0, one_shot: bool | None = None
) -> list[Tensor]:
    """Against the reference of the format, applied to the norm that the same call gave; without that norm the same bits.

    All of it by FlashInfer's own kernels for the format.
    """
    with by_flashinfer(*patterns(how), one_shot=one_shot):
        return _check_quantised(what, comm, layer, how, bias)


def check_by_reference(what: object, comm: Communicator, layer: Layer, how: Quantization) -> None:
    """The same of a format that this GPU has no kernels for: FlashInfer's fused norm, then torch."""
    with by_flashinfer(NORM):
        _check_quantised(what, comm, layer, how, 0.0)


def _check_quantised(what: object, comm: Communicator, layer: Layer, how: Quantization, bias: float) -> list[Tensor]:
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
