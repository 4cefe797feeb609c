"""Every pattern of FlashInfer on GPUs against core's reference on a sum in rank order."""

from __future__ import annotations

import pytest
import torch
from flashinfer_gpu import (
    EPS,
    Layer,
    by_flashinfer,
    check_by_reference,
    check_quantised,
    formats,
    groups,
    how_to,
    marks,
    most_bytes,
    ready,
    serves,
    shapes,
)
from gpu_numbers import DTYPES, bits, checksum, expect, inputs, reduced
from gpu_ranks import Rank, World

from commplane_flashinfer.patterns import ALL_REDUCE, NORM

pytestmark = marks()

HIDDENS = [512, 520, 1024, 1032, 2880, 4096, 5120, 7168, 8192]
TOKENS = [1, 2, 3, 5, 8, 17, 64, 130, 512, 2048]
ALGORITHMS = ["auto", "one_shot", "two_shot"]
ONE_SHOT = {"auto": None, "one_shot": True, "two_shot": False}


def sums(rank: Rank, name: str, algorithm: str) -> list[int]:
    """Whole rows, tails, one element, views; in and out of place."""
    dtype, device, n = DTYPES[name], rank.device, rank.world_size
    tp, checks = ready(rank, dtype, algorithm=algorithm), []
    counts = [1, 7, 8, 4096, 4097, 8 * 4096, 100_003, most_bytes(rank) // dtype.itemsize]
    for count in [c for c in counts if c * dtype.itemsize <= most_bytes(rank)]:
        parts = inputs(n, count, dtype, count, device)
        mine, wanted = parts[rank.rank], reduced(parts)
        before = mine.clone()
        serves(tp, "all_reduce", mine.nbytes, dtype)
        odd = torch.zeros(count + 1, dtype=dtype, device=device)[1:].copy_(mine)
        wide = torch.zeros(count, 2, dtype=dtype, device=device)[:, 0].copy_(mine)
        with by_flashinfer(ALL_REDUCE):
            out = tp.all_reduce(mine)
        expect((name, count), out, wanted)
        expect((name, count, "its input"), mine, before)
        for what, call, tensor in (
            ("in place", tp.all_reduce_, mine.clone()),
            ("misaligned", tp.all_reduce_, odd),
            ("strided", tp.all_reduce, wide),
        ):
            with by_flashinfer(ALL_REDUCE):
                again = call(tensor)
            expect((name, count, what), again, wanted)
        checks.append(checksum(out))
    return checks


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", groups())
def test_a_sum_has_the_bits_of_one_in_rank_order(world: World, name: str, algorithm: str) -> None:
    first, *others = world.run(sums, name, algorithm)
    assert all(other == first for other in others)


def norms(rank: Rank, name: str, algorithm: str) -> list[int]:
    dtype = DTYPES[name]
    tp, checks, one_shot = ready(rank, dtype, algorithm=algorithm), [], ONE_SHOT[algorithm]
    for tokens, hidden in shapes(rank, dtype, HIDDENS, TOKENS):
        if algorithm == "two_shot" and tokens <= rank.world_size:
            continue
        layer = Layer(rank, dtype, tokens, hidden, tokens + hidden)
        serves(tp, "all_reduce_rms_norm", layer.mine.nbytes, dtype)
        for bias in (0.0, 1.0):
            what = (name, algorithm, tokens, hidden, bias)
            kept = layer.mine.clone()
            with by_flashinfer(NORM, one_shot=one_shot):
                norm, residual = tp.all_reduce_rms_norm(layer.mine, layer.before, layer.weight, EPS, bias)
            layer.check(what, norm, residual, bias)
            expect((what, "its input"), layer.mine, kept)
            x, r = layer.mine.clone(), layer.before.clone()
            with by_flashinfer(NORM, one_shot=one_shot):
                tp.all_reduce_rms_norm_(x, r, layer.weight, EPS, bias)
            assert torch.equal(bits(x), bits(norm)) and torch.equal(bits(r), bits(residual)), (what, "in place")
            checks += [checksum(norm), checksum(residual)]
    assert checks, "no size was safe here"
    return checks


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", groups())
def test_the_fused_norm_is_a_sum_and_a_norm(world: World, name: str, algorithm: str) -> None:
    first, *others = world.run(norms, name, algorithm)
    assert all(other == first for other in others)


def leading_dimensions(rank: Rank) -> None:
    """[..., hidden], a view of columns, and a tensor that begins at an odd address."""
    dtype, device, hidden = torch.bfloat16, rank.device, 1024
    tp = ready(rank, dtype)
    layer = Layer(rank, dtype, 6, hidden, 3)
    with by_flashinfer(NORM):
        norm, residual = tp.all_reduce_rms_norm(layer.mine.view(2, 3, hidden), layer.before.view(2, 3, hidden), layer.weight, EPS)
    assert norm.shape == residual.shape == (2, 3, hidden)
    layer.check("three dimensions", norm.view(6, hidden), residual.view(6, hidden))
    columns = [torch.zeros(6, hidden + 8, dtype=dtype, device=device)[:, 1 : hidden + 1] for _ in range(2)]
    x, r = columns[0].copy_(layer.mine), columns[1].copy_(layer.before)
    with by_flashinfer(NORM):
        got = tp.all_reduce_rms_norm(x, r, layer.weight, EPS)
    layer.check("columns", *got)
    with by_flashinfer(NORM):
        tp.all_reduce_rms_norm_(x, r, layer.weight, EPS)
    layer.check("columns, in place", x, r)
    empty = torch.empty(0, hidden, dtype=dtype, device=device)
    norm, residual = tp.all_reduce_rms_norm(empty, empty.clone(), layer.weight, EPS)
    assert norm.shape == residual.shape == (0, hidden)


@pytest.mark.parametrize("size", groups())
def test_leading_dimensions_views_and_no_tokens_give_the_same(world: World) -> None:
    world.run(leading_dimensions)


def quantised(rank: Rank, name: str, algorithm: str, kind: str) -> list[int]:
    dtype, how = DTYPES[name], how_to(kind, rank.device)
    tp, checks = ready(rank, dtype, algorithm=algorithm), []
    for tokens, hidden in shapes(rank, dtype, [512, 1024, 4096, 7168, 8192], [1, 3, 5, 17, 130, 512]):
        if algorithm == "two_shot" and tokens <= rank.world_size:
            continue
        layer = Layer(rank, dtype, tokens, hidden, tokens + hidden)
        serves(tp, "all_reduce_rms_norm_quant", layer.mine.nbytes, dtype, kind)
        for bias in (0.0, 1.0):
            out = check_quantised((name, kind, algorithm, tokens, hidden, bias), tp, layer, how, bias, ONE_SHOT[algorithm])
            checks += [checksum(t) for t in out]
    assert checks, "no size was safe here"
    return checks


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["fp8_static", "fp8_token", "fp8_group"])
@pytest.mark.parametrize("size", groups())
def test_each_format_is_within_one_step_of_its_reference(world: World, name: str, algorithm: str, kind: str) -> None:
    first, *others = world.run(quantised, name, algorithm, kind)
    assert all(other == first for other in others)


def four_bits(rank: Rank) -> list[bool]:
    """Whether this GPU has kernels for it, and whether the plan takes FlashInfer's; the result is right in either case."""
    tp, how = ready(rank, torch.bfloat16), how_to("nvfp4", rank.device)
    layer = Layer(rank, torch.bfloat16, 5, 1024, 9)
    (check_quantised if "nvfp4" in formats() else check_by_reference)("nvfp4", tp, layer, how)
    answer = tp.plan.explain("all_reduce_rms_norm_quant", nbytes=layer.mine.nbytes, dtype="bfloat16", op="nvfp4")
    return ["nvfp4" in formats(), answer.chosen == "flashinfer"]


@pytest.mark.parametrize("size", groups(most=2))
def test_nvfp4_comes_from_the_reference_where_the_kernel_would_write_zeros(world: World) -> None:
    """Before SM100 the kernel is empty."""
    for has_kernels, chosen in world.run(four_bits):
        assert has_kernels == chosen


def canary(rank: Rank) -> list[str]:
    with rank.plane.communicator("canary", device=str(rank.device), backends=["flashinfer"]) as comm:
        return list(comm.plan.backends)


@pytest.mark.parametrize("size", groups())
def test_the_canary_of_each_collective_and_format_passes(world: World) -> None:
    for backends in world.run(canary):
        assert backends[0] == "flashinfer", backends
