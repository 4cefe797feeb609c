"""The reference of quantised norms, against what each format says in its own words. Local, no ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commplane.api import QuantFormat, misquantized
from commplane.api.quantize import FP8_MAX, Quantization, _to_fp4, quantize, swizzled_offsets

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[E4M3.isfinite()]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def norms(tokens: int, hidden: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, hidden, generator=g) * torch.exp2(torch.randint(-12, 12, (tokens, 1), generator=g).float())
    rows[torch.rand(tokens, generator=g) < 0.1] = 0.0
    return rows.to(dtype)


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """How far the nearest entry of `table` is."""
    return (values[..., None] - table).abs().amin(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_a_static_scale_gives_the_nearest_value_and_the_largest_where_it_is_too_small(dtype, tokens, seed) -> None:
    x = norms(tokens, 32, seed, dtype)
    q = quantize(x, Quantization("fp8_static", torch.tensor([0.25])))
    wanted = (x.float() * 4.0).clamp(-FP8_MAX, FP8_MAX)
    assert q.values.shape == x.shape and torch.equal((q.values.float() - wanted).abs(), nearest(wanted, E4M3))
    assert float(q.scales) == 0.25


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_a_scale_for_each_token_brings_its_largest_value_to_the_largest_of_the_format(tokens, seed) -> None:
    x = norms(tokens, 48, seed)
    q = quantize(x, Quantization("fp8_token"))
    assert q.scales.shape == (tokens, 1) and q.scales.dtype is torch.float32 and q.scales.is_contiguous()
    top = x.float().abs().amax(-1, keepdim=True)
    assert torch.equal(q.scales, (top / FP8_MAX).clamp_min(2.0**-9 / FP8_MAX))
    wanted = (x.float() / q.scales).clamp(-FP8_MAX, FP8_MAX)
    assert torch.equal((q.values.float() - wanted).abs(), nearest(wanted, E4M3))


@pytest.mark.parametrize("hidden", [128, 384, 640])
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_groups_have_the_least_power_of_two_that_is_enough_packed_four_to_a_word_in_columns(hidden, tokens, seed) -> None:
    x = norms(tokens, hidden, seed)
    q = quantize(x, Quantization("fp8_group", group=128))
    groups = hidden // 128
    assert q.scales.shape == (tokens, math.ceil(groups / 4)) and q.scales.dtype is torch.int32
    assert q.scales.stride() == (1, math.ceil(tokens / 4) * 4)
    for t in range(tokens):
        for g in range(groups):
            part = x[t, g * 128 : (g + 1) * 128].float()
            exponent = (int(q.scales[t, g // 4]) >> (8 * (g % 4)) & 0xFF) - 127
            least = max(float(part.abs().max() / FP8_MAX), float(torch.tensor(1e-10)))
            assert 2.0 ** (exponent - 1) < least <= 2.0**exponent
            wanted = (part / 2.0**exponent).clamp(-FP8_MAX, FP8_MAX)
            found = q.values[t, g * 128 : (g + 1) * 128].float()
            assert torch.equal((found - wanted).abs(), nearest(wanted, E4M3))


@pytest.mark.parametrize(("tokens", "hidden"), [(1, 16), (3, 48), (5, 64), (130, 80)])
def test_fp4_blocks_are_nearest_to_the_scaled_values_and_scales_lie_in_their_tiles(tokens: int, hidden: int) -> None:
    x, world = norms(tokens, hidden, tokens), torch.tensor([100.0])
    q = quantize(x, Quantization("nvfp4", world))
    blocks = hidden // 16
    offsets = swizzled_offsets(tokens, blocks)
    assert (
        len(offsets.unique()) == tokens * blocks and q.scales.numel() == math.ceil(tokens / 128) * 128 * math.ceil(blocks / 4) * 4
    )
    padding = torch.ones(q.scales.numel(), dtype=torch.bool)
    padding[offsets.reshape(-1)] = False
    assert not q.scales[padding].any()
    stored = q.scales[offsets].view(torch.float8_e4m3fn).float()
    wanted = (world * (x.float().reshape(tokens, blocks, 16).abs().amax(-1) * (1.0 / 6.0))).clamp(max=FP8_MAX)
    assert torch.equal((stored - wanted).abs(), nearest(wanted, E4M3))
    codes = torch.stack([q.values & 15, q.values >> 4], -1).reshape(tokens, blocks, 16)
    numbers = E2M1[(codes & 7).long()]
    size = (x.float().reshape(tokens, blocks, 16) * torch.where(stored == 0, 0.0, world / stored)[..., None]).abs().clamp(max=6.0)
    assert torch.equal((numbers - size).abs(), nearest(size, E2M1))
    assert torch.equal((codes & 8) != 0, torch.signbit(x.reshape(tokens, blocks, 16)))


@pytest.mark.parametrize(("middle", "even"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)])
def test_halfway_between_two_fp4_numbers_the_even_code_is_taken(middle: float, even: int) -> None:
    row = torch.zeros(1, 16)
    row[0, 0], row[0, 1] = 6.0, middle  # the block's scale becomes 1
    q = quantize(row, Quantization("nvfp4", torch.ones(1)))
    assert int(q.values[0, 0]) >> 4 == even


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="fp8_static wants a scale"):
        Quantization("fp8_static")
    with pytest.raises(ValueError, match="fp8_token computes its scales"):
        Quantization("fp8_token", torch.ones(1))
    with pytest.raises(ValueError, match="wants a hidden size that 128 divides for fp8_group group=128, found 100"):
        quantize(torch.zeros(1, 100), Quantization("fp8_group"))
    with pytest.raises(ValueError, match="wants a hidden size that 16 divides for nvfp4, found 24"):
        quantize(torch.zeros(1, 24), Quantization("nvfp4", torch.ones(1)))
    with pytest.raises(ValueError, match="not a valid QuantFormat"):
        Quantization("fp3")


def test_every_format_can_be_captured_no_tensor_is_made_from_numbers_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host is refused inside of a CUDA graph."""
    x, scale = torch.randn(4, 256), torch.ones(1)
    wanted = {f: quantize(x, Quantization(f, scale if f in ("fp8_static", "nvfp4") else None)) for f in QuantFormat}
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.delattr(torch, name)
    for f in QuantFormat:
        again = quantize(x, Quantization(f, scale if f in ("fp8_static", "nvfp4") else None))
        assert misquantized(again, wanted[f]) is None


def test_nvfp4_rounds_to_nearest_with_ties_to_the_even_code() -> None:
    middles = (E2M1[:-1] + E2M1[1:]) / 2
    values = torch.cat([E2M1, middles, middles - 1e-3, middles + 1e-3, torch.tensor([7.0, 100.0])])
    values = torch.cat([values, -values])
    found = _to_fp4(values)
    far = (values.abs().clamp(max=6.0)[:, None] - E2M1).abs()
    best = far == far.amin(1, keepdim=True)
    # Of two codes that are as near, the even one.
    wanted = torch.tensor([min((code % 2, code) for code in row.nonzero().flatten().tolist())[1] for row in best])
    assert torch.equal(found.int() & 7, wanted.int())
    assert torch.equal(found >> 3, torch.signbit(values).to(torch.uint8))
