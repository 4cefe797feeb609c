"""The calls of a communicator, over an imitation of FlashInfer's kernels: what they ask for, and what comes out."""

import math
from collections.abc import Callable
from typing import cast

import pytest
import torch
from flashinfer_world import FORMATS, NORM, QUANT, SUM, Rank, World, numbers
from torch import Tensor

from commplane.api import Collective, QuantFormat, Quantization, add_rms_norm, misquantized, quantize

pytestmark = pytest.mark.timeout(60)


def total_of(tensors: list[Tensor]) -> Tensor:
    out = tensors[0].float()
    for tensor in tensors[1:]:
        out = out + tensor.float()
    return out.to(tensors[0].dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}[found.dtype]
    torch.testing.assert_close(found.float(), wanted.float(), rtol=step, atol=1e-6)


def bits(tensor: Tensor) -> Tensor:
    """Without another meaning than its bits; there are no NaNs and no -0.0 in a scale."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(3, 256), (4097,), (1,), (), (2, 3, 5), (40, 512)], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_of_any_shape_is_exact_and_bitwise_equal_on_all_ranks(
    dtype: torch.dtype, shape: tuple[int, ...], in_place: bool
) -> None:
    world = World(4)
    inputs = [numbers(shape, dtype, r) for r in range(4)]

    def body(rank: Rank, r: int) -> Tensor:
        mine = inputs[r].clone()
        found = rank.bind(SUM, dtype, in_place)(mine)
        assert (found is mine) is in_place
        assert in_place or torch.equal(mine, inputs[r])
        return cast("Tensor", found)

    wanted = total_of(inputs)
    for found in world.run(body):
        assert found.shape == shape
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_sum_takes_tensors_that_are_strided_misaligned_or_want_a_gradient(in_place: bool) -> None:
    world = World(2)
    base = [numbers((64, 33), torch.float32, r) for r in range(2)]
    views: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.t(),
        lambda t: t.reshape(-1)[1:257],
        lambda t: t[:, ::2],
        lambda t: t.clone().requires_grad_(not in_place),
    ]
    for view in views:
        wanted = total_of([view(t).detach() for t in base])

        def body(rank: Rank, r: int, view: Callable[[Tensor], Tensor] = view) -> Tensor:
            found: Tensor = rank.bind(SUM, torch.float32, in_place)(view(base[r].clone()))
            assert not found.requires_grad
            return found

        assert all(torch.equal(found, wanted) for found in world.run(body))


def test_a_short_sum_in_place_goes_through_no_copy() -> None:
    world = World(2)

    def body(rank: Rank, r: int) -> bool:
        mine = torch.ones(1000)
        rank.bind(SUM, torch.float32, in_place=True)(mine)
        call = rank.comm.calls[0]
        return call["input"].data_ptr() == call["output"].data_ptr() == mine.data_ptr()

    assert world.run(body) == [True, True]


@pytest.mark.parametrize("collective", [SUM, NORM, QUANT], ids=str)
def test_a_call_with_no_elements_launches_nothing(collective: Collective) -> None:
    world = World(2)
    empty, weight = torch.empty((0, 128), dtype=torch.bfloat16), torch.ones(128, dtype=torch.bfloat16)
    for how in FORMATS if collective is QUANT else [None]:
        more = () if collective is SUM else (empty, weight, 1e-6, 0.0) if how is None else (empty, weight, 1e-6, 0.0, how, True)
        found = world.ranks[0].bind(collective)(empty, *more)  # one rank alone: a launch would wait for the other
        if how is not None:
            assert misquantized(found[0], quantize(empty, how)) is None
            found = found[1:]
        for tensor in found if collective is not SUM else [found]:
            assert tensor.shape == (0, 128)
    assert not world.ranks[0].comm.calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 256), (3, 256), (2, 9, 64), (5, 12), (4, 7), (64,)], ids=str)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_a_fused_norm_is_that_of_the_reference(
    dtype: torch.dtype, shape: tuple[int, ...], in_place: bool, algorithm: str
) -> None:
    world = World(2, options={"algorithm": algorithm, "pdl": True})
    inputs = [numbers(shape, dtype, r) for r in range(2)]
    residual, weight = numbers(shape, dtype, 9), numbers(shape[-1:], dtype, 10)

    def body(rank: Rank, r: int) -> tuple[Tensor, Tensor]:
        mine, other = inputs[r].clone(), residual.clone()
        norm, total = rank.bind(NORM, dtype, in_place)(mine, other, weight, 1e-5, 1.0)
        assert (norm is mine and total is other) is in_place
        assert in_place or (torch.equal(mine, inputs[r]) and torch.equal(other, residual))
        return norm, total

    wanted = add_rms_norm(total_of(inputs), residual, weight, 1e-5, 1.0)
    found = world.run(body)
    for norm, total in found:
        assert torch.equal(total, wanted[1])
        close(norm, wanted[0])
        assert torch.equal(norm, found[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 256), (2, 3, 384), (130, 128)], ids=str)
@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("how", FORMATS, ids=lambda h: h.label)
def test_a_quantised_norm_is_that_of_the_reference_bit_by_bit(
    dtype: torch.dtype, shape: tuple[int, ...], keep_norm: bool, how: Quantization
) -> None:
    world = World(2)
    inputs = [numbers(shape, dtype, r) for r in range(2)]
    residual, weight = numbers(shape, dtype, 9), numbers(shape[-1:], dtype, 10)
    found = world.run(
        lambda rank, r: (
            *rank.bind(QUANT, dtype)(inputs[r], residual, weight, 1e-5, 0.0, how, keep_norm),
            rank.bind(NORM, dtype)(inputs[r], residual, weight, 1e-5, 0.0)[0],
        )
    )
    for quantised, norm, total, unquantised in found:
        wanted = quantize(unquantised, how)
        assert quantised.format is how.format
        for a, b in ((quantised.values, wanted.values), (quantised.scales, wanted.scales)):
            assert a.shape == b.shape and a.dtype == b.dtype
            assert torch.equal(bits(a), bits(b))
        if how.format is QuantFormat.FP8_GROUP:
            assert quantised.scales.stride() == wanted.scales.stride() == (1, math.ceil(math.prod(shape[:-1]) / 4) * 4)
        assert torch.equal(total, add_rms_norm(total_of(inputs), residual, weight, 1e-5)[1])
        assert (norm is not None) is keep_norm
        assert norm is None or torch.equal(norm, unquantised)


@pytest.mark.parametrize("how", FORMATS, ids=lambda h: h.label)
def test_rows_that_no_kernel_takes_are_summed_and_quantised_by_the_reference(how: Quantization) -> None:
    hidden = how.group * 1031 if how.format is QuantFormat.FP8_GROUP else 16 * 4099  # too many threads for the blocks they make
    world = World(2)
    inputs = [numbers((1, hidden), torch.bfloat16, r) for r in range(2)]
    residual, weight = inputs[0] * 0.5, torch.ones(hidden, dtype=torch.bfloat16)
    wanted = quantize(add_rms_norm(total_of(inputs), residual, weight, 1e-5)[0], how)
    for quantised, norm, _ in world.run(lambda rank, r: rank.bind(QUANT)(inputs[r], residual, weight, 1e-5, 0.0, how, False)):
        assert norm is None
        assert misquantized(quantised, wanted) is None
    assert [call["pattern"] for call in world.ranks[0].comm.calls] == [0]


def test_every_call_says_its_algorithm_and_gives_all_outputs() -> None:
    world = World(2, options={"pdl": False})
    inputs = [numbers((8, 256), torch.bfloat16, r) for r in range(2)]
    weight = torch.ones(256, dtype=torch.bfloat16)

    def body(rank: Rank, r: int) -> None:
        rank.bind(SUM)(inputs[r])
        rank.bind(NORM)(inputs[r], inputs[0], weight, 1e-5, 0.5)
        for how in FORMATS:
            for keep in (False, True):
                rank.bind(QUANT)(inputs[r], inputs[0], weight, 1e-5, 0.5, how, keep)

    world.run(body)
    made = world.ranks[1].comm.calls
    assert [call["pattern"] for call in made] == [0, 1, 2, 4, 10, 11, 8, 9, 8, 9, 3, 5]
    for call in made:
        assert call["use_oneshot"] in (True, False)
        assert call["trigger_completion_at_end"] is True
        assert call["fp32_acc"] is True
        assert call["launch_with_pdl"] is False
        assert "allocated" not in call
        assert call["scale_factor"] is None or isinstance(call["scale_factor"], Tensor)
        assert call["pattern"] == 0 or (call["weight_bias"] == 0.5 and call["rms_eps"] == 1e-5)


def test_results_in_place_go_where_the_tensors_show_them() -> None:
    world = World(2)
    base = [numbers((256, 6), torch.float32, r) for r in range(2)]
    other, weight = numbers((256, 6), torch.float32, 5), torch.ones(256)[::1]

    def body(rank: Rank, r: int) -> tuple[Tensor, Tensor]:
        mine, residual = base[r].clone(), other.clone()
        found = rank.bind(NORM, torch.float32, in_place=True)(mine.t(), residual.t(), weight, 1e-5, 0.0)
        assert torch.equal(mine.t(), found[0]) and torch.equal(residual.t(), found[1])
        return cast("tuple[Tensor, Tensor]", found)

    wanted = add_rms_norm(total_of([t.t() for t in base]), other.t(), weight, 1e-5)
    for norm, total in world.run(body):
        close(norm, wanted[0])
        assert torch.equal(total, wanted[1])
