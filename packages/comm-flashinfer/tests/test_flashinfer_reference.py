"""The oracle of the fused ops, core's reference, against loops over single numbers that say what FlashInfer's kernels do."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from commplane.api import QuantFormat, Quantization, add_rms_norm, quantize

pytestmark = pytest.mark.timeout(60)

F = np.float32
# Codes in ascending order; the code of a number is its place, and an even place wins a tie.
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SEEDS = range(4)


def nearest(value: float, table: list[float]) -> int:
    """The code of a number of 0 or more: to nearest, ties to even, saturating."""
    size = min(value, table[-1])
    upper = next(i for i, entry in enumerate(table) if entry >= size)
    if table[upper] == size:
        return upper
    down, up = size - table[upper - 1], table[upper] - size
    return upper if up < down or (up == down and upper % 2 == 0) else upper - 1


def e4m3(value: np.float32) -> int:
    """The byte of a number."""
    if math.isnan(value):
        return 0x7F
    return nearest(abs(float(value)), E4M3) | (0x80 if np.signbit(value) else 0)


def rows(seed: int, dtype: torch.dtype, tokens: int = 5, hidden: int = 128) -> Tensor:
    """Numbers of many sizes, with rows and groups of zeros, ties and the largest and smallest of their dtype."""
    g = torch.Generator().manual_seed(seed)
    out = torch.randn((tokens, hidden), generator=g) * torch.exp2(torch.randint(-12, 12, (tokens, hidden), generator=g).float())
    out[0] = 0.0
    out[1, :32] = 0.0
    out[1, 5] = -0.0
    out[2] = torch.randint(-24, 25, (hidden,), generator=g) / 4.0
    out[2, 0] = 6.0
    info = torch.finfo(dtype)
    out[3, ::7] = min(info.max, 3e38)
    out[3, 1::7] = info.tiny
    out[4, 0] = 448.0
    return out.to(dtype)


def floats(tensor: Tensor) -> list[np.float32]:
    return [F(x) for x in tensor.float().reshape(-1).tolist()]


def codes(tensor: Tensor) -> list[int]:
    return [int(b) for b in tensor.contiguous().view(torch.uint8).reshape(-1).tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_norm_is_rounded_after_the_residual_and_at_the_end_alone(dtype: torch.dtype, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    total, residual = (torch.randn((3, 40), generator=g).to(dtype) for _ in range(2))
    weight = torch.randn(40, generator=g).to(dtype)
    eps, bias = 1e-5, float(seed % 2)
    norm, new = add_rms_norm(total.clone(), residual, weight, eps, bias)
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-21}[dtype]
    for t in range(3):
        summed = [a + b for a, b in zip(floats(total[t]), floats(residual[t]), strict=True)]
        v = torch.tensor(summed).to(dtype)
        assert torch.equal(new[t], v)
        mean = math.fsum(float(x) ** 2 for x in floats(v)) / 40
        for i, (x, w) in enumerate(zip(floats(v), floats(weight), strict=True)):
            wanted = float(x) / math.sqrt(mean + eps) * (bias + float(w))
            assert abs(float(norm[t, i]) - wanted) <= step * abs(wanted) + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("given", [0.25, 0.3, 1e-3, 700.0])
def test_a_static_scale_divides_through_its_reciprocal_and_saturates(dtype: torch.dtype, seed: int, given: float) -> None:
    norm, scale = rows(seed, dtype), torch.tensor([given])
    found = quantize(norm, Quantization(QuantFormat.FP8_STATIC, scale))
    inverse = F(1.0) / F(scale.item())
    with np.errstate(over="ignore"):
        assert codes(found.values) == [e4m3(x * inverse) for x in floats(norm)]
    assert found.scales is scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_token_is_scaled_by_its_largest_number(dtype: torch.dtype, seed: int) -> None:
    norm = rows(seed, dtype)
    found = quantize(norm, Quantization(QuantFormat.FP8_TOKEN))
    for t in range(len(norm)):
        values = floats(norm[t])
        scale = max(max(abs(x) for x in values) / F(448.0), F(1.0 / 512.0) / F(448.0))
        assert F(found.scales[t, 0].item()) == scale
        assert codes(found.values[t]) == [e4m3(min(max(x / scale, F(-448.0)), F(448.0))) for x in values]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("group", [16, 32, 128])
def test_a_group_is_scaled_by_the_power_of_two_that_is_not_below(dtype: torch.dtype, seed: int, group: int) -> None:
    norm = rows(seed, dtype)
    found = quantize(norm, Quantization(QuantFormat.FP8_GROUP, group=group))
    tokens, groups = len(norm), norm.shape[1] // group
    assert tuple(found.scales.shape) == (tokens, -(-groups // 4))
    assert found.scales.stride() == (1, -(-tokens // 4) * 4)
    for t in range(tokens):
        for k in range(-(-groups // 4) * 4):
            stored = (int(found.scales[t, k // 4]) >> (8 * (k % 4))) & 0xFF
            if k >= groups:
                assert stored == 0
                continue
            values = floats(norm[t, k * group : (k + 1) * group])
            scale = max(max(abs(x) for x in values) / F(448.0), F(1e-10))
            bits = int(np.array(scale, np.float32).view(np.uint32))
            exponent = (bits >> 23) + (1 if bits & 0x7FFFFF else 0)
            assert stored == exponent
            power = F(2.0 ** (exponent - 127))
            wanted = [e4m3(min(max(x / power, F(-448.0)), F(448.0))) for x in values]
            assert codes(found.values[t, k * group : (k + 1) * group]) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("given", [1.0, 3.7, 200.0])
def test_a_block_is_scaled_by_a_rounded_scale_of_its_own(dtype: torch.dtype, seed: int, given: float) -> None:
    norm = rows(seed, dtype, tokens=133 if seed == 0 and given == 1.0 else 5, hidden=80)
    found = quantize(norm, Quantization(QuantFormat.NVFP4, torch.tensor([given])))
    scales, columns, seen = found.scales.tolist(), 2, set()
    for t in range(len(norm)):
        for k in range(5):
            values = floats(norm[t, 16 * k : 16 * (k + 1)])
            with np.errstate(over="ignore"):
                stored = e4m3(F(given) * (max(abs(x) for x in values) * (F(1.0) / F(6.0))))
            at = (t // 128 * columns + k // 4) * 512 + t % 32 * 16 + t % 128 // 32 * 4 + k % 4
            seen.add(at)
            assert scales[at] == stored
            scale = F(E4M3[stored])
            factor = F(given) / scale if scale else F(0.0)
            got = codes(found.values[t, 8 * k : 8 * (k + 1)])
            with np.errstate(over="ignore"):
                scaled = [x * factor for x in values]
            wanted = [nearest(abs(float(x)), E2M1) | (8 if np.signbit(x) else 0) for x in scaled]
            assert [c for pair in got for c in (pair & 15, pair >> 4)] == wanted
    assert not any(value for at, value in enumerate(scales) if at not in seen)


def test_what_is_no_number_stays_none_in_the_reference() -> None:
    norm = torch.tensor([[math.nan, math.inf, -math.inf, 1.0] * 4])
    static = quantize(norm, Quantization(QuantFormat.FP8_STATIC, torch.tensor(1.0)))
    assert codes(static.values)[:4] == [0x7F, 0x7E, 0xFE, 0x38]
    # The kernels pass over a NaN when they look for the largest, and store -448 for one; the reference lets it be seen.
    token = quantize(norm, Quantization(QuantFormat.FP8_TOKEN))
    assert bool(token.scales.isnan().all())
    assert set(codes(token.values)) <= {0x7F, 0xFF}
