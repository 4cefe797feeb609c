"""Before anything real, each built backend proves what it does: data whose result tells which ranks were combined.

Rank r contributes a value at position r (modulo the world size) and zero elsewhere, so that each element of a sum is one rank's
contribution: a rank left out, counted twice, or of another group shows at its own position. Two rounds with different values
catch a buffer that is not refreshed. All values are small integers, exact in every dtype.

For `all_reduce_rms_norm` the residual makes every sum one whose norm is exact too, with an eps, a weight and a bias of the weight
that each change the result: only how the reciprocal root is approximated is left to the backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from commplane.agree.device import settle
from commplane.api import (
    BackendSpec,
    BuildContext,
    Capability,
    Collective,
    CommBackend,
    QuantFormat,
    Quantization,
    ReduceOp,
    misquantized,
    quantize,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CanaryError", "check", "verify_overrides"]

# Beyond one element a rank, so that vector code and its tail both run.
_REPEATS = 9

# Columns of a row that is normed, of each rank: a few, and vector code has a tail again.
_NORM_COLUMNS = 12
# Groups of a row that is quantised: more than the four whose scales share a word. Three rows of them are 1920 elements, however
# many the ranks: what a backend has to have room for to be tried.
_GROUPS = 5

# How far a norm may be from the exact one, in units of its last place.
_NORM_ULPS = 2


class CanaryError(Exception):
    """A backend gave a wrong result."""


def verify_overrides(spec: BackendSpec, backend: CommBackend) -> None:
    """What the spec declares must be implemented: a class that inherits the refusing body is a wrong declaration. Local."""
    methods = {
        Capability.ALL_REDUCE: "all_reduce_",
        Capability.SYMMETRIC_MEMORY: "empty",
        **{Capability(c.value): c.value for c in Collective if c is not Collective.ALL_REDUCE},
    }
    for capability, method in methods.items():
        if capability in spec.capabilities and getattr(type(backend), method) is getattr(CommBackend, method):
            raise CanaryError(f"declares {capability} but {type(backend).__name__} does not override {method}")


def check(spec: BackendSpec, backend: CommBackend, context: BuildContext) -> None:
    """Run every collective the spec declares, in each dtype and op it claims. Collective; raises `CanaryError`.

    A rank that finds something wrong goes on to the end with the others: kernels that wait for it on the device may have no
    deadline.
    """
    found: list[CanaryError] = []
    for collective in spec.collectives():
        if collective is Collective.BARRIER:
            backend.barrier()
            continue
        for name in sorted(spec.dtypes) or ["float32"]:
            dtype = getattr(torch, name)
            if collective.norms:
                hows = [None] if collective is Collective.ALL_REDUCE_RMS_NORM else _quantizations(spec, context.device)
                for how in hows if dtype.is_floating_point else ():
                    for salt in (0, 1):
                        with _noted(found):
                            _check_norm(backend, context, dtype, salt, how)
                continue
            ops: list[ReduceOp | None] = [None]
            if collective.reduces:
                ops = [o for o in ReduceOp if o in spec.ops and (o is not ReduceOp.AVG or dtype.is_floating_point)]
            for op in ops:
                for salt in (0, 1):
                    for what, got, wanted in _run(backend, context, collective, op, dtype, salt):
                        with _noted(found):
                            _compare(f"{what} of {name}", got, wanted, op, context)
    settle(context.device)  # nothing of it runs on beside the first call of the user, whose stream is another
    if found:
        raise found[0]


@contextmanager
def _noted(found: list[CanaryError]) -> Iterator[None]:
    """Keep what is wrong for later."""
    try:
        yield
    except CanaryError as error:
        found.append(error)


def _values(context: BuildContext, dtype: torch.dtype, salt: int, count: int | None = None) -> Tensor:
    """Row r is what rank r contributes, `count` elements."""
    n = context.world_size
    rows = torch.zeros(n, n * _REPEATS if count is None else count)
    for r in range(n):
        rows[r, r::n] = 1 + (r + salt) % 5
    return rows.to(device=context.device, dtype=dtype)


def _reduced(rows: Tensor, op: ReduceOp) -> Tensor:
    wide = rows.double()
    if op is ReduceOp.MIN:
        return wide.amin(0)
    if op is ReduceOp.MAX:
        return wide.amax(0)
    return wide.sum(0) if op is ReduceOp.SUM else wide.mean(0)


def _run(
    backend: CommBackend,
    context: BuildContext,
    collective: Collective,
    op: ReduceOp | None,
    dtype: torch.dtype,
    salt: int,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    rows = _values(context, dtype, salt)
    if op is ReduceOp.MIN:
        # Zeros would win everywhere: let the ranks' own values compete instead.
        rows = rows + torch.arange(1, context.world_size + 1, device=rows.device).flip(0)[:, None].to(dtype)
    mine, rank, n = rows[context.rank].clone(), context.rank, context.world_size
    if collective is Collective.ALL_REDUCE and op is not None:
        yield f"all_reduce {op}, out of place", backend.all_reduce(mine, op), _reduced(rows, op)
        yield "the input of all_reduce", mine.clone(), rows[rank]
        yield f"all_reduce {op}, in place", backend.all_reduce_(mine, op), _reduced(rows, op)
    elif collective is Collective.REDUCE_SCATTER and op is not None:
        wanted = _reduced(rows, op).reshape(n, -1)[rank]
        yield f"reduce_scatter {op}", backend.reduce_scatter(mine, op), wanted
    elif collective is Collective.ALL_GATHER:
        yield "all_gather", backend.all_gather(mine), rows.reshape(-1)
    elif collective is Collective.BROADCAST:
        src = salt % n
        yield f"broadcast from {src}", backend.broadcast(mine, src), rows[src]


def _quantizations(spec: BackendSpec, device: str) -> list[Quantization]:
    """Each format of the spec, with a scale where it wants one."""
    scales = {QuantFormat.FP8_STATIC: 0.25, QuantFormat.NVFP4: 16.0}
    return [
        Quantization(f, torch.tensor([scales[f]], device=device) if f in scales else None)
        for f in QuantFormat
        if f in spec.formats
    ]


def _check_norm(
    backend: CommBackend, context: BuildContext, dtype: torch.dtype, salt: int, how: Quantization | None = None
) -> None:
    """Three rows whose squares have the means 3, 15 and 63, which an eps of 1 makes powers of 4; in the second round times 4."""
    n = context.world_size
    hidden = n * _NORM_COLUMNS if how is None else how.group * _GROUPS  # the group of fp8_group, which every format divides
    rows = _values(context, dtype, salt, 3 * hidden).reshape(n, 3, hidden)
    scale = 1 + salt
    new = torch.tensor([[1, 3, -1, 1], [1, -1, 3, 7], [-1, 1, 9, 13]]).mul_(scale).repeat(1, hidden // 4).to(rows)
    inverse = torch.tensor([[1 / 2], [1 / 4], [1 / 8]], dtype=torch.float64, device=rows.device) / scale
    residual = new - rows.sum(0)
    column = torch.arange(hidden, device=rows.device)
    # Every other stretch as long as a group has smaller norms, so that the scale of a neighbour is another one.
    weight = (column % torch.where(column // 128 % 2 == 0, 7, 2) + 0.5).to(dtype)
    eps, weight_bias = float(scale**2), float(salt)
    norm = new.double() * inverse * (weight_bias + weight.double())
    what = f"eps {eps:g} and weight_bias {weight_bias:g} of {str(dtype).removeprefix('torch.')}"
    inputs = rows[context.rank].clone(), residual.clone(), weight.clone()
    if how is None:
        what = f"all_reduce_rms_norm with {what}"
        got, total = backend.all_reduce_rms_norm(*inputs, eps, weight_bias)
    else:
        what = f"all_reduce_rms_norm_quant to {how.format} with {what}"
        quantized, kept, total = backend.all_reduce_rms_norm_quant(*inputs, eps, weight_bias, how, True)
        alone, none, _ = backend.all_reduce_rms_norm_quant(*inputs, eps, weight_bias, how, False)
        if kept is None:
            raise CanaryError(f"{what} gave no norm, which was asked for")
        got = kept
        settle(context.device)
        wanted = quantize(got, how)
        wrong = (
            misquantized(quantized, wanted) or misquantized(alone, wanted) or (none is not None and "a norm was not asked for")
        )
        if wrong:
            raise CanaryError(f"{what} is wrong: {wrong}")
    settle(context.device)
    _compare(f"the residual of {what}", total, new, None, context)
    for name, after, before in zip(("tensor", "residual", "weight"), inputs, (rows[context.rank], residual, weight), strict=True):
        if not torch.equal(after, before):
            raise CanaryError(f"{what} changed its {name}")
    if got.shape != norm.shape or got.dtype is not dtype or total.dtype is not dtype:
        raise CanaryError(
            f"{what} gave a norm of {got.dtype}{list(got.shape)} and a residual of {total.dtype}, "
            f"wanted {dtype}{list(norm.shape)} for both"
        )
    place = torch.finfo(dtype).eps * torch.exp2(norm.abs().log2().floor())
    off = ~((got.double() - norm).abs() <= _NORM_ULPS * place)
    if bool(off.any()):
        row, column = off.nonzero()[0].tolist()
        raise CanaryError(
            f"{what} is wrong: the norm at row {row}, column {column} is {got[row, column].item():g}, "
            f"wanted {norm[row, column].item():g}"
        )


def _compare(what: str, got: Tensor, wanted: Tensor, op: ReduceOp | None, context: BuildContext) -> None:
    # A backend may write on a stream of its own; that it should have been waited for is not what is asked here.
    settle(context.device)
    # Only a mean of integers may need rounding, and then within the precision of the dtype it is held in.
    tolerance = torch.finfo(got.dtype).eps * 8 if op is ReduceOp.AVG else 0.0
    wide, wanted = got.double(), wanted.double()
    if wide.shape != wanted.shape:
        raise CanaryError(f"{what} has shape {list(wide.shape)}, wanted {list(wanted.shape)}")
    wrong = ((wide - wanted).abs() > tolerance * wanted.abs()) | wide.isnan()
    if bool(wrong.any()):
        i = int(wrong.reshape(-1).nonzero()[0])
        owner = context.ranks[i % context.world_size]
        raise CanaryError(
            f"{what} is wrong: element {i}, which tells whether rank {owner} took part, is {wide.reshape(-1)[i].item():g}, "
            f"wanted {wanted.reshape(-1)[i].item():g}"
        )
