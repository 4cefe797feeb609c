"""`all_reduce_rms_norm` of `custom_ar`: one pass over the data, the same bits on every rank, right to the last place."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from car_oracle import FLOATS, digest, inputs, normed, same_bits, ulps
from car_threads import run
from torch import Tensor

from commplane.runtime import Plane

# Rows of less than a vector, of odd sizes, of a model's size, and longer than a chunk of 4 KiB, which then goes in pieces.
SHAPES = [(0, 8), (3, 0), (1, 1), (5, 7), (2, 3, 33), (7, 128), (4, 1024), (2, 5000)]
# How far a norm may be off, in units of the last place. Where 16-bit numbers are computed in float32, only the last rounding
# counts. In float32 the sum of squares, the root and three products are rounded as well.
ULPS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 4.0, torch.float64: 4.0}
EPS = 1e-6


def by_name(value: object) -> str:
    return str(value).removeprefix("torch.")


Arguments = tuple[list[Tensor], Tensor, Tensor]


def arguments(world_size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Arguments:
    """What each rank contributes, the residual and the weight."""
    parts = inputs(world_size, shape, dtype, seed)
    (residual,), (weight,) = inputs(1, shape, dtype, seed + 1), inputs(1, shape[-1:], dtype, seed + 2)
    return parts, residual, weight


@pytest.mark.parametrize(("world_size", "dtype"), [*product([2, 3, 4], FLOATS)], ids=by_name)
def test_the_residual_is_exact_and_the_norm_right_to_the_last_place(world_size: int, dtype: torch.dtype) -> None:
    cases = [(arguments(world_size, shape, dtype, seed=i), bias) for i, shape in enumerate(SHAPES) for bias in (0.0, 1.0)]

    def rank_main(plane: Plane) -> str:
        tp = plane.communicator("tp")
        assert tp.plan.explain("all_reduce_rms_norm", nbytes=4096, dtype=dtype).chosen == "custom_ar"
        buffer = tp.empty(16_384, dtype=dtype)
        seen = []
        for (parts, residual, weight), bias in cases:
            mine = parts[tp.rank]
            wanted, total = normed(parts, residual, weight, EPS, bias)
            symmetric = buffer[: mine.numel()].view(mine.shape).copy_(mine)
            ways = {"staged": tp.all_reduce_rms_norm(mine, residual, weight, EPS, bias)}
            ways["symmetric"] = tp.all_reduce_rms_norm(symmetric, residual, weight, eps=EPS, weight_bias=bias)
            assert same_bits(mine, parts[tp.rank]) and same_bits(symmetric, mine), "an input was changed"
            ways["in place"] = tp.all_reduce_rms_norm_(mine.clone(), residual.clone(), weight, EPS, bias)
            ways["in place, symmetric"] = tp.all_reduce_rms_norm_(symmetric, residual.clone(), weight, EPS, bias)
            for way, (norm, new) in ways.items():
                where = f"{way} {list(mine.shape)} bias {bias}"
                assert same_bits(new, total), where
                assert norm.dtype is dtype and norm.shape == mine.shape, where
                assert ulps(norm, wanted) <= ULPS[dtype], where
                assert same_bits(norm, ways["staged"][0]), where
            seen += [*ways["staged"]]
        return digest(seen)

    assert len(set(run(world_size, rank_main))) == 1


@pytest.mark.parametrize("dtype", FLOATS, ids=by_name)
def test_arguments_of_any_layout_give_the_same_bits(dtype: torch.dtype) -> None:
    parts, residual, weight = arguments(2, (6, 40), dtype, seed=5)

    def strided(value: Tensor) -> Tensor:
        wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])[..., ::2]
        return wide.copy_(value)

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        plain = tp.all_reduce_rms_norm(parts[tp.rank], residual, weight, EPS)
        other = tp.all_reduce_rms_norm(strided(parts[tp.rank]), strided(residual), strided(weight), EPS)
        assert not strided(weight).is_contiguous()
        assert all(same_bits(a, b) for a, b in zip(plain, other, strict=True))
        row = parts[tp.rank][:1].expand(6, -1)
        norm, new = tp.all_reduce_rms_norm(row, residual[:1].expand(6, -1), weight[:1].expand(40), EPS)
        wanted, total = normed([p[:1].expand(6, -1) for p in parts], residual[:1].expand(6, -1), weight[:1].expand(40), EPS, 0.0)
        assert same_bits(new, total.contiguous()) and ulps(norm, wanted) <= ULPS[dtype]

    run(2, rank_main)


def test_float64_is_composed_of_an_all_reduce_and_torch_and_routed_here() -> None:
    """In one pass only up to float32; the sum is the native one all the same, and so in rank order."""
    parts, residual, weight = arguments(3, (4, 100), torch.float64, seed=9)

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        before = len(tp.backends[0].flight_records())
        tp.all_reduce_rms_norm(parts[tp.rank], residual, weight, EPS)
        (record,) = tp.backends[0].flight_records()[before:]
        assert (record.collective, record.dtype) == ("all_reduce", "float64")
        narrow = [t.float() for t in (parts[tp.rank], residual, weight)]
        tp.all_reduce_rms_norm(narrow[0], narrow[1], narrow[2], EPS)
        (record,) = tp.backends[0].flight_records()[before + 1 :]
        assert (record.collective, record.dtype) == ("all_reduce_rms_norm", "float32")

    run(3, rank_main)


def test_rows_of_zeros_and_of_huge_numbers_come_out_by_the_formula() -> None:
    """An eps of 0 makes a row of zeros NaN, as in torch; squares beyond float32 make a row 0."""
    zeros, huge = torch.zeros(1, 64), torch.full((1, 64), 1e30)
    weight = torch.ones(64)

    def rank_main(plane: Plane) -> None:
        tp = plane.communicator("tp")
        norm, new = tp.all_reduce_rms_norm(zeros, zeros, weight, 0.0)
        assert bool(norm.isnan().all()) and same_bits(new, zeros)
        norm, new = tp.all_reduce_rms_norm(zeros, zeros, weight, EPS)
        assert same_bits(norm, zeros)
        norm, new = tp.all_reduce_rms_norm(huge, zeros, weight, EPS)
        assert same_bits(norm, zeros) and same_bits(new, 2 * huge)

    run(2, rank_main)
